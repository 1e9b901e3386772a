"""The plan of a recipe on a device, and what `auto` comes to there: recomputing, kept graphs."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace

from coca_scale.errors import UserError
from coca_scale.planning.costs import count_costs
from coca_scale.planning.gpus import Gpu
from coca_scale.planning.plan import MARGIN, Costs, Plan, make_plan, memory_of
from coca_scale.recipe import BatchSplit, Recipe
from coca_scale.recipe.total_steps import total_steps


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
    """The recipe with what the device has room for where it says `auto`.

    First as little to recompute as there is room for: nothing, or norms and activation functions,
    or beside these as many blocks as it takes, or all. Then as many kept graphs as go into what is
    left: one takes nothing more than a micro-batch needs anyway.

    Returns:
        The recipe, and what was counted for it.

    Raises:
        UserError: as `count_costs`.
    """
    graphs = recipe.engine.kept_graphs
    tried = _with(recipe, kept_graphs=0) if graphs == "auto" else recipe
    tried, costs = _recomputing(tried, batch, gpu, gpus_per_node)
    if graphs != "auto" or batch.accumulation == 1:
        return tried, costs
    number = most_graphs(recipe, batch, costs, gpu, gpus_per_node)
    return _with(tried, kept_graphs=number), replace(costs, kept_graphs=number)


def teacher_is_cut(recipe: Recipe, batch: BatchSplit, gpu: Gpu, gpus_per_node: int) -> bool:
    """Whether a teacher's weights are cut over the ranks, so that there is room for them."""
    placement = recipe.loss.distill.placement
    if placement != "auto" or batch.ranks == 1:
        return placement == "sharded"
    costs = count_costs(recipe, batch, varlen=not gpu.is_host)
    return memory_of(recipe, batch, costs, gpu, gpus_per_node).teacher_is_cut


def most_graphs(
    recipe: Recipe, batch: BatchSplit, costs: Costs, gpu: Gpu, gpus_per_node: int
) -> int:
    """Kept graphs that the device has room for; `costs` were counted without any."""
    if batch.accumulation == 1:
        return 0

    def too_many(number: int) -> bool:
        more = replace(costs, kept_graphs=number)
        return more.activations_bytes > _room(recipe, batch, more, gpu, gpus_per_node)

    most = 1 if costs.recomputed else batch.accumulation  # those are what there was no room for
    return max(1, bisect_left(range(1, most + 1), True, key=too_many))


def _recomputing(
    recipe: Recipe, batch: BatchSplit, gpu: Gpu, gpus_per_node: int
) -> tuple[Recipe, Costs]:
    """As `fitted`, for what is recomputed."""
    varlen = not gpu.is_host
    if recipe.engine.activation_checkpointing != "auto":
        return recipe, count_costs(recipe, batch, varlen)
    room = 0.0
    for mode in ("none", "selective"):
        tried = _with(recipe, activation_checkpointing=mode, activation_budget_gb=None)
        costs = count_costs(tried, batch, varlen)
        room = _room(recipe, batch, costs, gpu, gpus_per_node)
        if costs.activations_bytes <= room:
            return tried, costs
    within = {"activation_checkpointing": "selective", "activation_budget_gb": max(room, 1.0) / 1e9}
    tried = _with(recipe, **within)
    try:
        return tried, count_costs(tried, batch, varlen)
    except UserError:  # more than it has even so: the run may know better than the plan
        tried = _with(recipe, activation_checkpointing="full", activation_budget_gb=None)
        return tried, count_costs(tried, batch, varlen)


def _room(recipe: Recipe, batch: BatchSplit, costs: Costs, gpu: Gpu, gpus_per_node: int) -> float:
    """Bytes for activations: what the device has for them, within the recipe's budget."""
    total = memory_of(recipe, batch, costs, gpu, gpus_per_node).total
    room = gpu.memory_bytes * (1 - MARGIN) - (total - costs.activations_bytes)
    wanted = recipe.engine.activation_budget_gb
    return room if wanted is None else min(room, wanted * 1e9)


def _with(recipe: Recipe, **changes: object) -> Recipe:
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update=changes)})
