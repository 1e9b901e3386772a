"""What was left out of the data: counts, the list of bad samples, and the limit."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from coca_scale.data.sample import Skipped, causes_text
from coca_scale.engine.ownership import Owner
from coca_scale.engine.world import World
from coca_scale.errors import AgreedError
from coca_scale.recipe.run_folder import BAD_SAMPLES
from coca_scale.training.appending import append

MAX_LISTED = 1_000_000
MANY_SAMPLES = 256
BY_CHANCE = 1e-4  # what few samples cannot be if the run is to stop


class SkipLog:
    """Skipped samples of all ranks.

    Totals are summed with every step; names and causes stay on their rank until `flush`, so that a
    filter that leaves out half of the data costs no more than a number per step.
    """

    def __init__(self, world: World, owner: Owner, folder: Path, max_bad_fraction: float) -> None:
        self.bad = 0
        self.filtered = 0
        self.causes: Counter[str] = Counter()
        self._world = world
        self._owner = owner
        self._path = folder / BAD_SAMPLES
        self._limit = max_bad_fraction
        self._filtered_here: Counter[str] = Counter()
        self._bad_here: list[Skipped] = []
        self._listed = 0

    def add(self, skipped: Iterable[Skipped]) -> tuple[int, int]:
        """Remember what this rank skipped; returns its bad and filtered samples."""
        bad = filtered = 0
        for sample in skipped:
            if sample.filtered:
                self._filtered_here[sample.cause] += sample.lost
                filtered += sample.lost
            else:
                self._bad_here.append(sample)
                bad += sample.lost
        return bad, filtered

    def total(self, bad: int, filtered: int, good: int, step: int) -> None:
        """Add the sums over all ranks; a collective where too much is bad.

        Args:
            bad: new unusable samples.
            filtered: new filtered samples.
            good: samples used so far in the run.
            step: that they were skipped for.

        Raises:
            AgreedError: the unusable share is above the limit.
        """
        self.bad += bad
        self.filtered += filtered
        seen = self.bad + good
        if bad and too_many(self.bad, seen, self._limit):
            self.flush(step)
            raise AgreedError(
                f"{self.bad} of {seen} samples are unusable ({self.summary()}), more than "
                f"data.max_bad_fraction={self._limit} allows; {self._path} lists them"
            )

    def flush(self, step: int) -> None:
        """Bring everything to rank 0's list and every rank's counts. A collective."""
        parts = self._world.gather((self._filtered_here, self._bad_here))
        self._filtered_here, self._bad_here = Counter(), []
        lines = []
        for filtered, bad in parts:
            self.causes += filtered
            for sample in bad:
                self.causes[sample.cause] += sample.lost
                about = {"cause": sample.cause, "key": sample.key, "shard": sample.shard}
                lines.append(json.dumps({"step": step, **about, "samples": sample.lost}))
        lines = lines[: max(0, MAX_LISTED - self._listed)]
        self._listed += len(lines)
        if lines and self._owner.holds():
            append(self._path, "\n".join(lines) + "\n")

    def summary(self) -> str:
        """Counts by cause, the most frequent first."""
        return causes_text(self.causes)

    def state(self) -> dict[str, Any]:
        """For a checkpoint, after `flush`."""
        return {
            "bad": self.bad,
            "filtered": self.filtered,
            "causes": dict(self.causes),
            "listed": self._listed,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.bad, self.filtered = state["bad"], state["filtered"]
        self.causes = Counter(state["causes"])
        self._listed = state["listed"]


def too_many(bad: int, seen: int, limit: float) -> bool:
    """Whether more than a share of the data is bad.

    Of many samples the share itself tells. Few may have bad ones among them by chance: they tell
    if so many would come once in 10,000 times where just `limit` of the data is bad.

    Args:
        bad: unusable samples.
        seen: all samples.
        limit: share that may be bad.
    """
    if bad <= limit * seen or seen >= MANY_SAMPLES:
        return bad > limit * seen
    chances = (
        math.comb(seen, n) * limit**n * (1 - limit) ** (seen - n) for n in range(bad, seen + 1)
    )
    return sum(chances) < BY_CHANCE
