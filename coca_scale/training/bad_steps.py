"""Steps that go wrong: losses that are not finite, spikes, and when it is enough."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from coca_scale.engine.ownership import Owner
from coca_scale.engine.train_engine import StepResult
from coca_scale.engine.world import World
from coca_scale.errors import AgreedError
from coca_scale.recipe.run_folder import BAD_STEPS
from coca_scale.recipe.schema import HealthSection
from coca_scale.training.appending import append

HORIZON_STEPS = 100
SETTLED_STEPS = 50


class Rollback(Exception):
    """Go back to the last checkpoint, and on with the data behind this step."""


class BadSteps:
    """Counts, lists and judges bad steps; all methods give the same on every rank."""

    def __init__(
        self, world: World, owner: Owner, folder: Path, health: HealthSection, rollbacks: int
    ) -> None:
        """`rollbacks`: how many are left."""
        self.skipped = 0
        self.spikes = 0
        self._world = world
        self._owner = owner
        self._path = folder / BAD_STEPS
        self._health = health
        self._rollbacks = rollbacks
        self._in_a_row = 0
        self._spread = LossSpread()

    def look(self, step: int, result: StepResult, keys: list[str]) -> str | None:
        """Judge a step; a collective where it was skipped.

        Args:
            step: its number.
            result: what it did.
            keys: samples of this rank.

        Returns:
            A line for the log if something was wrong.

        Raises:
            AgreedError: too many bad steps in a row.
            Rollback: likewise, and the recipe wants to go back instead.
        """
        note = self._spike(step, result.loss_at_most) if result.applied else None
        if not result.applied:
            self.skipped += 1
            note = self._list(step, result, keys)
        self._in_a_row = self._in_a_row + 1 if note is not None else 0
        if self._in_a_row >= self._health.max_bad_steps:
            if self._rollbacks > 0:
                raise Rollback(note)
            if not result.applied:
                raise AgreedError(
                    f"{self._in_a_row} steps in a row were skipped, the last at step {step} "
                    f"({note}); {self._path} lists their samples. Lower optim.lr, or let the run "
                    "go back by itself with health.rollbacks=3"
                )
        return note

    def _list(self, step: int, result: StepResult, keys: list[str]) -> str:
        """Write which ranks and samples it was."""
        finite = self._world.gather(result.finite_here)
        ranks = [r for r, good in enumerate(finite) if not good]
        shown = keys if not result.finite_here or not ranks else []
        found = self._world.gather(shown)
        named = ", ".join(self._world.name_of(r) for r in ranks[:4]) or "the gradient alone"
        if self._owner.holds():
            samples = {str(r): k for r, k in enumerate(found) if k}
            about = {"step": step, "ranks": ranks, "samples": samples}
            append(self._path, json.dumps(about) + "\n")
        return f"step {step} skipped: not finite on {named}"

    def _spike(self, step: int, loss: float) -> str | None:
        limit = self._health.spike_deviations
        deviations = self._spread.add(loss)
        if limit is None or deviations < limit:
            return None
        self.spikes += 1
        return f"step {step}: loss spike to {loss:.3f}, {deviations:.0f} deviations above the mean"

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"skipped": self.skipped, "spikes": self.spikes, "spread": self._spread.state()}

    def load(self, state: dict[str, Any], other_losses: bool = False) -> None:
        """Go on from a checkpoint; with `other_losses` what it says of those is not the norm."""
        self.skipped, self.spikes = state["skipped"], state["spikes"]
        self._spread = LossSpread() if other_losses else LossSpread(*state["spread"])


class LossSpread:
    """Running mean and variance of the loss, exponentially forgetting."""

    def __init__(self, count: int = 0, mean: float = 0.0, variance: float = 0.0) -> None:
        self._count, self._mean, self._variance = count, mean, variance

    def add(self, value: float) -> float:
        """Deviations of `value` above the mean so far, 0 at the start; then take it in.

        A spike is taken in as if it were at the limit of the usual, or a few would be the norm.
        """
        deviation = math.sqrt(self._variance)
        above = (value - self._mean) / max(deviation, 1e-12)
        settled = self._count >= SETTLED_STEPS
        if settled:
            value = min(value, self._mean + 4 * deviation)
        weight = max(1 / (self._count + 1), 1 / HORIZON_STEPS)
        difference = value - self._mean
        self._mean += weight * difference
        self._variance = (1 - weight) * (self._variance + weight * difference**2)
        self._count += 1
        return above if settled else 0.0

    def state(self) -> tuple[int, float, float]:
        """Arguments that make it again."""
        return self._count, self._mean, self._variance
