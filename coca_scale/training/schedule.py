"""Learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from coca_scale.losses import LABELS
from coca_scale.recipe.loss_weights import weight_at
from coca_scale.recipe.schema import ScheduleSection
from coca_scale.recipe.stages import Stage, schedule_at, stage_at


def rate_of(stages: Sequence[Stage], step: int) -> float:
    """Learning rate of step `step` (from 0) of a run.

    A schedule spans the stage that names its peak and those after it that name none; each may have
    a factor on it.
    """
    began, steps = schedule_at(stages, step)
    recipe = began.recipe
    rate = learning_rate(step - began.first, steps, recipe.optim.lr, recipe.schedule)
    return rate * stage_at(stages, step).lr_factor


def loss_weights_of(stages: Sequence[Stage], step: int) -> dict[str, float]:
    """Weights of the losses in step `step` (from 0) of a run, by name.

    Points that a stage names itself are counted over it, others over the run.
    """
    here, found = stage_at(stages, step), {}
    for name in LABELS:
        own = f"{name}_weight" in here.own_losses
        first, last = (here.first, here.last) if own else (0, stages[-1].last)
        found[name] = weight_at(here.recipe.loss.weight(name), step - first, last - first)
    return found


def weights_move(stages: Sequence[Stage]) -> bool:
    """Whether the weight of a loss is not the same in all steps of a run."""
    kinds = [[stage.recipe.loss.weight(name) for name in LABELS] for stage in stages]
    return any(found != kinds[0] for found in kinds) or any(isinstance(w, dict) for w in kinds[0])


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleSection) -> float:
    """Learning rate of step `step` (from 0) of `steps`.

    Linear warm-up, then cosine to zero, constant, or constant with a linear decay to zero at the
    end. A warm-up longer than the run is cut to its length.
    """
    warmup = min(schedule.warmup_steps, steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.name == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    if schedule.name == "constant-cooldown" and step >= steps - schedule.cooldown_steps:
        return peak * (steps - step) / schedule.cooldown_steps
    return peak
