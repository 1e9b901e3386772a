"""Batch arithmetic: how `global_batch` is cut over ranks, micro-batches and lanes."""

from __future__ import annotations

from dataclasses import dataclass

from coca_scale.errors import UserError
from coca_scale.recipe.lanes import divisors, usual_lanes
from coca_scale.recipe.schema import Recipe


@dataclass(frozen=True)
class BatchSplit:
    """How one optimizer step is divided.

    `global_batch = ranks × accumulation × micro_batch`, and every lane gives
    `samples_per_lane` samples to every step.
    """

    global_batch: int
    ranks: int
    micro_batch: int
    accumulation: int
    lanes: int

    @property
    def samples_per_rank(self) -> int:
        """Samples of one step that one rank computes."""
        return self.micro_batch * self.accumulation

    @property
    def samples_per_lane(self) -> int:
        """Samples of one step that one lane gives."""
        return self.global_batch // self.lanes

    @property
    def lanes_per_rank(self) -> int:
        """Lanes that one rank reads."""
        return self.lanes // self.ranks

    @classmethod
    def from_recipe(cls, recipe: Recipe, ranks: int) -> BatchSplit:
        """Divide the recipe's batch over `ranks` processes.

        Raises:
            UserError: the global batch cannot be divided, with the values that could be.
        """
        batch, micro = recipe.train.global_batch, recipe.train.micro_batch
        if batch % ranks:
            raise UserError(
                f"train.global_batch={batch} does not divide over {ranks} ranks; "
                f"use a multiple of {ranks} or another number of ranks"
            )
        per_rank = batch // ranks
        if per_rank % micro:
            best = max(d for d in divisors(per_rank) if d <= micro)
            raise UserError(
                f"train.micro_batch={micro} does not divide the {per_rank} samples per rank "
                f"(train.global_batch={batch} over {ranks} ranks); "
                f"train.micro_batch={best} would"
            )
        lanes = recipe.data.lanes or default_lanes(batch, ranks)
        if batch % lanes:
            raise UserError(f"data.lanes={lanes} does not divide train.global_batch={batch}")
        if lanes % ranks:
            raise UserError(
                f"data.lanes={lanes} cannot be dealt to {ranks} ranks evenly; "
                f"use a multiple of {ranks} that divides train.global_batch={batch}"
            )
        return cls(batch, ranks, micro, per_rank // micro, lanes)


def default_lanes(global_batch: int, ranks: int) -> int:
    """Only a job with more than 1024 ranks or an odd number of them needs `data.lanes`."""
    lanes = usual_lanes(global_batch)
    if lanes % ranks:
        fitting = [d for d in divisors(global_batch) if d % ranks == 0]
        raise UserError(
            f"the default of {lanes} lanes cannot be dealt to {ranks} ranks evenly; "
            f"set data.lanes={fitting[0]} in the recipe and keep it for the whole run"
        )
    return lanes
