"""Where a run's data stands, over stages that may have different data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coca_scale.data.loader import LaneStates
from coca_scale.recipe.stages import Stage

Lanes = list[list[int]]


@dataclass(frozen=True)
class Skip:
    """Where a rank's data goes on after a bad stretch.

    Attributes:
        stage: whose data it is.
        lanes: of this rank.
    """

    stage: int
    lanes: LaneStates


@dataclass(frozen=True)
class Positions:
    """Where a run's data stands.

    Attributes:
        lanes: of the stage, in order; None at the beginning of its data.
        left: of data that later stages left, by the number of the last stage that had it.
    """

    lanes: Lanes | None
    left: dict[str, Lanes]

    @classmethod
    def of(cls, progress: Mapping[str, Any], stages: Sequence[Stage], stage: Stage) -> Positions:
        """As `stage` begins or goes on, from what a checkpoint keeps of it or the one before.

        Data that was read before goes on where it was left, and other data begins at its beginning.
        """
        lanes, left = progress.get("lanes"), dict(progress.get("left", {}))
        if lanes is None:
            return cls(None, {})
        held = stages[progress.get("stage", 1) - 1]
        if _data(held) == _data(stage):
            return cls(lanes, left)
        left[str(held.number)] = lanes
        again = [number for number in left if _data(stages[int(number) - 1]) == _data(stage)]
        return cls(left.pop(max(again, key=int)) if again else None, left)


def _data(stage: Stage) -> object:
    return stage.recipe.data.train
