"""What to set so that a step of the same global batch is shortest, within the devices' memory.

Tried are micro-batches (and with them accumulation), what is recomputed and the ZeRO stage, each
with as many kept graphs as there is room for. For each kind of recomputation the model is counted
at two small micro-batches; FLOPs of the others lie on the line through them, bytes on it or, where
something else is alive at the peak, above it. The candidate that comes first by these estimates is
counted itself, and the next until a counted one is still the first.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import log

from coca_scale.errors import UserError
from coca_scale.planning.costs import count_costs
from coca_scale.planning.fit import MARGIN, most_graphs
from coca_scale.planning.gpus import Gpu
from coca_scale.planning.plan import Costs, Plan, make_plan, memory_of
from coca_scale.recipe import BatchSplit, Recipe, recipe_from_dict
from coca_scale.recipe.batch import divisors

STAGES = (1, 2, 3)
MODES = ("none", "selective", "auto", "full")  # auto here: some blocks whole, by a budget
WORTH = 0.005  # of a step, below which two take the same
COUNTED = (8, 32)  # micro-batches, about


@dataclass(frozen=True, order=True)
class Choice:
    """Keys of a recipe that are tried together."""

    micro_batch: int
    zero_stage: int
    mode: str


@dataclass(frozen=True)
class Suggestion:
    """The recipe with the shortest step.

    Attributes:
        overrides: that make it of the one that was asked for; none where that is it.
        batch: over the ranks.
        costs: counted for it.
        plan: of a step; the length of the run is not looked at.
    """

    overrides: list[str]
    batch: BatchSplit
    costs: Costs
    plan: Plan

    def is_better(self, than: Plan) -> bool:
        """Whether it is worth a change."""
        return not than.fits or self.plan.step_seconds < (1 - WORTH) * than.step_seconds

    def json(self, before: Plan) -> dict[str, object]:
        """Its overrides, none where nothing is better than what was planned before; its plan."""
        better = self.is_better(before)
        return {
            "overrides": self.overrides if better else [],
            "plan": (self.plan if better else before).json(),
        }


def suggest(
    recipe: Recipe, ranks: int, gpu: Gpu, gpus_per_node: int = 8, stage: int | None = None
) -> Suggestion:
    """Search.

    Args:
        recipe: of the run, or of one of its stages.
        ranks: devices.
        gpu: each of them.
        gpus_per_node: of which so many share a node.
        stage: index of the stage, for which only what a stage may change is tried.

    Raises:
        UserError: nothing fits, or as `count_costs`.
    """
    search = _Search(recipe, ranks, gpu, gpus_per_node, stage)
    waiting = [(search.place(choice, step), choice) for choice, step in search.estimates()]
    heapq.heapify(waiting)
    counted: dict[Choice, tuple[Costs, Plan]] = {}
    while waiting:
        _, choice = heapq.heappop(waiting)
        if choice in counted:
            return search.suggestion(choice, *counted[choice])
        try:
            costs, plan = search.counted(choice)
        except UserError:  # its budget is too small even so
            continue
        if _fits(plan):
            counted[choice] = costs, plan
            heapq.heappush(waiting, (search.place(choice, plan.step_seconds), choice))
    raise UserError(
        f"no micro-batch, recomputation and ZeRO stage of this recipe fits on {ranks} such devices"
    )


def _fits(plan: Plan) -> bool:
    return plan.total_bytes <= plan.device_bytes * (1 - MARGIN)


class _Search:
    """Counts and plans of what is tried."""

    def __init__(
        self, recipe: Recipe, ranks: int, gpu: Gpu, gpus_per_node: int, stage: int | None = None
    ) -> None:
        self._stage = stage
        self._recipe, self._gpu, self._gpus_per_node = recipe, gpu, gpus_per_node
        self._split = BatchSplit.from_recipe(recipe, ranks)
        self._counts: dict[tuple[int, str], Costs] = {}
        sizes = divisors(self._split.samples_per_rank)
        self._sizes = sizes
        self._pair = sorted({min(sizes, key=lambda n: abs(n - m)) for m in COUNTED})

    def place(self, choice: Choice, step: float) -> tuple[int, int, int]:
        """By what a choice is compared: of equal steps that with least recomputed and changed."""
        mode, changes = MODES.index(choice.mode), len(self._overrides(choice))
        return round(log(step) / WORTH), mode, changes

    def estimates(self) -> Iterator[tuple[Choice, float]]:
        """Whatever may fit, with the seconds of its step."""
        for micro in reversed(self._sizes):
            for stage in STAGES if self._stage is None else [self._recipe.engine.zero_stage]:
                yield from self._estimates(micro, stage)

    def _estimates(self, micro: int, stage: int) -> Iterator[tuple[Choice, float]]:
        tried: dict[str, tuple[int, Callable[[], Plan]]] = {}
        most = self._gpu.memory_bytes * (1 - MARGIN)
        for mode in ("none", "selective", "full"):
            choice = Choice(micro, stage, mode)
            found = self.recipe(choice)
            if found is None:
                return
            costs = self._with_graphs(found, micro, self._estimated(micro, mode))
            if stage == 3 and found.engine.compile == "blocks" and not costs.layer_parameters:
                return  # as `require_compilable`
            about = (found, self._batch(micro), costs, self._gpu, self._gpus_per_node)
            tried[mode] = memory_of(*about).total, partial(make_plan, *about, None)
            if tried[mode][0] <= most:
                yield choice, tried[mode][1]().step_seconds
        (selective, little), (full, all_blocks) = tried["selective"], tried["full"]
        if full <= most < selective:
            share = (selective - most) / (selective - full)
            steps = little().step_seconds, all_blocks().step_seconds
            yield Choice(micro, stage, "auto"), steps[0] + share * (steps[1] - steps[0])

    def recipe(self, choice: Choice) -> Recipe | None:
        """With a choice; None where it does not allow for it."""
        return self._with(choice, None)

    def _with(self, choice: Choice, budget_gb: float | None) -> Recipe | None:
        raw = self._recipe.model_dump()
        raw["train"]["micro_batch"] = choice.micro_batch
        raw["engine"] |= {
            "zero_stage": choice.zero_stage,
            "activation_checkpointing": choice.mode,
            "activation_budget_gb": budget_gb,
            "kept_graphs": 0,
        }
        try:
            return recipe_from_dict(raw)
        except UserError:
            return None

    def counted(self, choice: Choice) -> tuple[Costs, Plan]:
        """As the model itself says, at this micro-batch.

        Raises:
            UserError: `auto` is too little.
        """
        micro, recipe = choice.micro_batch, self.recipe(choice)
        assert recipe is not None
        if choice.mode == "auto":  # as `fitted` does it
            plan = self._plan(recipe, micro, self._estimated(micro, "selective"))
            room = self._gpu.memory_bytes * (1 - MARGIN) - plan.total_bytes + plan.activations_bytes
            selective = replace(choice, mode="selective")
            recipe = self._with(selective, max(room, 1.0) / 1e9)
            assert recipe is not None
            costs = count_costs(recipe, self._batch(micro), not self._gpu.is_host)
        else:
            costs = self._count(micro, choice.mode)
        costs = self._with_graphs(recipe, micro, costs)
        return costs, self._plan(recipe, micro, costs)

    def _with_graphs(self, recipe: Recipe, micro: int, costs: Costs) -> Costs:
        """With as many graphs kept as there is room for: they cost nothing else."""
        about = (recipe, self._batch(micro), costs, self._gpu, self._gpus_per_node)
        return replace(costs, kept_graphs=most_graphs(*about))

    def suggestion(self, choice: Choice, costs: Costs, plan: Plan) -> Suggestion:
        """What a choice means for the recipe that was asked for."""
        overrides, batch = self._overrides(choice), self._batch(choice.micro_batch)
        if costs.kept_graphs and self._recipe.engine.kept_graphs != "auto":
            overrides.append("engine.kept_graphs=auto")
        return Suggestion(overrides, batch, costs, plan)

    def _overrides(self, choice: Choice) -> list[str]:
        train, engine = self._recipe.train, self._recipe.engine
        changes = {
            "train.micro_batch": (train.micro_batch, choice.micro_batch),
            "engine.zero_stage": (engine.zero_stage, choice.zero_stage),
            "engine.activation_checkpointing": (engine.activation_checkpointing, choice.mode),
        }
        overrides = [f"{self._key(k)}={new}" for k, (old, new) in changes.items() if old != new]
        if engine.activation_budget_gb is not None:
            overrides.append("engine.activation_budget_gb=null")
        return overrides

    def _key(self, key: str) -> str:
        return key if self._stage is None else f"schedule.stages.{self._stage}.{key.split('.')[1]}"

    def _batch(self, micro: int) -> BatchSplit:
        accumulation = self._split.samples_per_rank // micro
        return replace(self._split, micro_batch=micro, accumulation=accumulation)

    def _plan(self, recipe: Recipe, micro: int, costs: Costs) -> Plan:
        batch = self._batch(micro)
        return make_plan(recipe, batch, costs, self._gpu, self._gpus_per_node, None)

    def _count(self, micro: int, mode: str) -> Costs:
        """Which no stage changes."""
        if (micro, mode) not in self._counts:
            recipe = self.recipe(Choice(micro, self._recipe.engine.zero_stage, mode))
            assert recipe is not None
            varlen = not self._gpu.is_host
            self._counts[micro, mode] = count_costs(recipe, self._batch(micro), varlen)
        return self._counts[micro, mode]

    def _estimated(self, micro: int, mode: str) -> Costs:
        """On the line through what is counted."""
        small, large = (self._count(size, mode) for size in (self._pair[0], self._pair[-1]))
        width = self._pair[-1] - self._pair[0]
        if micro in self._pair or width == 0:
            return self._count(micro, mode)

        def line(of: Callable[[Costs], float]) -> int:
            slope = (of(large) - of(small)) / width
            return round(of(large) + slope * (micro - self._pair[-1]))

        return replace(
            large,
            peak_bytes=line(lambda costs: costs.peak_bytes),
            graph_bytes=line(lambda costs: costs.graph_bytes),
            tower_flops=line(lambda costs: costs.tower_flops),
            step_flops=line(lambda costs: costs.step_flops),
        )
