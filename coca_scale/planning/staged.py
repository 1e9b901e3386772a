"""The plan of a run: of each of its stages, and of all together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from coca_scale.planning.fit import plan_run
from coca_scale.planning.gpus import Gpu
from coca_scale.planning.plan import Costs, Plan
from coca_scale.planning.suggest import Suggestion
from coca_scale.recipe import BatchSplit, Recipe
from coca_scale.recipe.stages import faults_of, recipes_of


@dataclass(frozen=True)
class PlannedStage:
    """A stage and its plan; a run without stages is one, without a name and an index.

    Attributes:
        name: for people.
        index: in schedule.stages.
        recipe: what holds in it.
        batch: over the ranks.
        costs: counted.
        plan: made of them.
    """

    name: str
    index: int | None
    recipe: Recipe
    batch: BatchSplit
    costs: Costs
    plan: Plan


@dataclass(frozen=True)
class Total:
    """What all stages come to.

    Attributes:
        samples: seen.
        flops: of all devices.
        hours: of the run; None where the length of a stage is unknown, as is what follows.
        gpu_hours: of all devices.
        cost_eur: None without a price.
    """

    samples: int | None
    flops: float | None
    hours: float | None
    gpu_hours: float | None
    cost_eur: float | None


def plan_stages(recipe: Recipe, ranks: int, gpu: Gpu, gpus_per_node: int = 8) -> list[PlannedStage]:
    """Every stage of a run, planned as a run of its own.

    Raises:
        UserError: as `plan_run`, with the stage's name.
    """
    planned = []
    for number, (name, own) in enumerate(recipes_of(recipe).items()):
        index = number if recipe.schedule.stages else None
        with faults_of(name):
            found = plan_run(own, ranks, gpu, gpus_per_node)
        planned.append(PlannedStage(name, index, own, *found))
    return planned


def total_of(stages: Sequence[PlannedStage], price: float | None = None) -> Total:
    """The sum, with `price` of a GPU-hour in euros."""
    plans = [stage.plan for stage in stages]
    steps = [plan.steps for plan in plans if plan.steps is not None]
    days = [plan.days for plan in plans if plan.days is not None]
    if len(steps) < len(plans) or len(days) < len(plans):
        return Total(None, None, None, None, None)
    rows = list(zip(stages, steps, strict=True))
    samples = [count * stage.batch.global_batch for stage, count in rows]
    flops = [n * stage.plan.flops_per_sample for n, (stage, _) in zip(samples, rows, strict=True)]
    hours = 24 * sum(days)
    gpu_hours = hours * stages[0].batch.ranks
    cost = None if price is None else price * gpu_hours
    return Total(sum(samples), sum(flops), hours, gpu_hours, cost)


def run_json(
    stages: Sequence[PlannedStage],
    suggestions: Sequence[Suggestion | None],
    price: float | None = None,
) -> dict[str, object]:
    """All numbers: of the run, or of each of its stages and their sum."""
    found: list[dict[str, object]] = []
    for stage, suggestion in zip(stages, suggestions, strict=True):
        numbers = stage.plan.json() | {"cost_eur": stage.plan.cost(price)}
        if suggestion is not None:
            numbers["suggestion"] = suggestion.json(stage.plan)
        found.append(numbers)
    if len(stages) == 1:
        return found[0]
    return {"stages": found, **asdict(total_of(stages, price))}
