"""Length of a run."""

from __future__ import annotations

import math

from coca_scale.errors import UserError
from coca_scale.recipe.schema import TrainSection
from coca_scale.recipe.section import MAX_STEPS


def total_steps(train: TrainSection, samples_per_epoch: int | None) -> int:
    """Optimizer steps of the run, from train.steps, train.samples or train.epochs.

    Raises:
        UserError: epochs are asked for and nobody knows how long one is, or there are more steps
            than a checkpoint's name can count.
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
    steps = math.ceil(samples / train.global_batch)
    if steps > MAX_STEPS:
        raise UserError(f"the run has {steps:,} steps; at most {MAX_STEPS:,} can be counted")
    return steps
