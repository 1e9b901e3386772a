"""The plan of a recipe on a device, and what `activation_checkpointing: auto` comes to there."""

from __future__ import annotations

from coca_scale.errors import UserError
from coca_scale.planning.costs import count_costs
from coca_scale.planning.gpus import Gpu
from coca_scale.planning.plan import Costs, Plan, make_plan
from coca_scale.recipe import BatchSplit, Recipe
from coca_scale.recipe.total_steps import total_steps

MARGIN = 0.03  # of a device's memory, by which plans were off on GPUs


def plan_run(
    recipe: Recipe, ranks: int, gpu: Gpu, gpus_per_node: int = 8
) -> tuple[BatchSplit, Costs, Plan]:
    """What a recipe costs on `ranks` devices: its batch over them, the counts, the plan.

    Raises:
        UserError: as `count_costs`, or the batch does not divide over the ranks.
    """
    batch = BatchSplit.from_recipe(recipe, ranks)
    known = recipe.train.epochs is None or recipe.data.train_samples is not None
    steps = total_steps(recipe.train, recipe.data.train_samples) if known else None
    recipe, costs = fitted(recipe, batch, gpu, gpus_per_node)
    return batch, costs, make_plan(recipe, batch, costs, gpu, gpus_per_node, steps)


def fitted(recipe: Recipe, batch: BatchSplit, gpu: Gpu, gpus_per_node: int) -> tuple[Recipe, Costs]:
    """The recipe with as little to recompute as the device has room for where it says `auto`.

    Nothing, or norms and activation functions, or beside these as many blocks as it takes, or all.

    Returns:
        The recipe, and what was counted for it.

    Raises:
        UserError: as `count_costs`.
    """
    varlen = not gpu.is_host
    if recipe.engine.activation_checkpointing != "auto":
        return recipe, count_costs(recipe, batch, varlen)
    wanted, room = recipe.engine.activation_budget_gb, 0.0
    for mode in ("none", "selective"):
        tried = _with(recipe, mode, None)
        costs = count_costs(tried, batch, varlen)
        plan = make_plan(tried, batch, costs, gpu, gpus_per_node, None)
        others = plan.total_bytes - plan.activations_bytes
        room = gpu.memory_bytes * (1 - MARGIN) - others
        room = room if wanted is None else min(room, wanted * 1e9)
        if plan.activations_bytes <= room:
            return tried, costs
    tried = _with(recipe, "selective", max(room, 1.0) / 1e9)
    try:
        return tried, count_costs(tried, batch, varlen)
    except UserError:  # more than it has even so: the run may know better than the plan
        tried = _with(recipe, "full", None)
        return tried, count_costs(tried, batch, varlen)


def _with(recipe: Recipe, mode: str, budget_gb: float | None) -> Recipe:
    changes = {"activation_checkpointing": mode, "activation_budget_gb": budget_gb}
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update=changes)})
