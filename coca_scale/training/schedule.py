"""Length of a run and learning rate over it."""

from __future__ import annotations

import math

from coca_scale.errors import UserError
from coca_scale.recipe.schema import ScheduleSection, TrainSection


def total_steps(train: TrainSection, samples_per_epoch: int | None) -> int:
    """Optimizer steps of the run, from train.steps, train.samples or train.epochs.

    Raises:
        UserError: epochs are asked for and nobody knows how long one is.
    """
    if train.steps is not None:
        return train.steps
    samples = train.samples
    if samples is None:
        assert train.epochs is not None
        if samples_per_epoch is None:
            raise UserError(
                "train.epochs needs the number of samples: set data.train_samples, "
                "or use train.steps or train.samples"
            )
        samples = math.ceil(train.epochs * samples_per_epoch)
    return math.ceil(samples / train.global_batch)


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
