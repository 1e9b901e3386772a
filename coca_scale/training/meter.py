"""Throughput, and who keeps the others waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from coca_scale.engine.world import World


class Meter:
    """Times of this rank since the last reading."""

    def __init__(self, world: World, global_batch: int, straggler_factor: float) -> None:
        """A rank is named that the others wait for longer than `straggler_factor` of the time."""
        self._world = world
        self._global_batch = global_batch
        self._factor = straggler_factor
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self._started = time.perf_counter()
        self.steps = 0
        self._data_seconds = 0.0
        self._others_seconds = 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """The block waits for this rank's next batch."""
        started = time.perf_counter()
        yield
        self._data_seconds += time.perf_counter() - started

    @contextmanager
    def waiting_for_others(self) -> Iterator[None]:
        """The block waits until all ranks have come as far: the last one waits least."""
        started = time.perf_counter()
        yield
        self._others_seconds += time.perf_counter() - started

    def read(self) -> tuple[dict[str, Any], str | None]:
        """Values for the metrics, and a line if a rank is slow; begins a new interval.

        A collective. `data_wait_fraction` is the mean over ranks, `..._max` that of the worst;
        `slowest_rank` is the one that the others waited for, for `straggler_seconds` per step.
        """
        seconds = time.perf_counter() - self._started
        rate = self.steps * self._global_batch / seconds
        mine = (self._data_seconds / seconds, self._others_seconds)
        everyone = self._world.gather(mine)
        waits = [min(1.0, wait) for wait, _ in everyone]
        others = [seconds for _, seconds in everyone]
        slowest = min(range(len(others)), key=others.__getitem__)
        lag = max(others) - others[slowest]
        values = {
            "samples_per_second": rate,
            "samples_per_second_per_rank": rate / self._world.size,
            "data_wait_fraction": sum(waits) / len(waits),
            "data_wait_fraction_max": max(waits),
            "slowest_rank": slowest,
            "straggler_seconds": lag / max(1, self.steps),
        }
        note = None
        if self._world.size > 1 and self.steps > 1 and lag > self._factor * seconds:
            note = (
                f"slow: the others waited {lag / seconds:.0%} of the time for "
                f"{self._world.name_of(slowest)}, which itself waited {waits[slowest]:.0%} for data"
            )
        self.restart()
        return values, note
