"""Throughput, and who keeps the others waiting."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from coca_scale.engine.world import World

SLOW_IN_A_ROW = 3  # readings


class Meter:
    """Times of this rank since the last reading."""

    def __init__(self, world: World, global_batch: int, straggler_factor: float) -> None:
        """A rank is named that the others wait for longer than `straggler_factor` of the time.

        And one whose device computes longer than the median by more than that share of it.
        """
        self._world = world
        self._global_batch = global_batch
        self._factor = straggler_factor
        self._slow_device = (-1, 0)  # a rank, and in how many readings in a row
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

    def read(self, compute_seconds: float | None = None) -> tuple[dict[str, Any], list[str]]:
        """Values for the metrics, and lines about slow ranks; begins a new interval.

        A collective. `data_wait_fraction` is the mean over ranks, `..._max` that of the worst;
        `slowest_rank` is the one that the others waited for, for `straggler_seconds` per step.
        `compute_slowest_rank` has the device that computes longest, `compute_slowdown` times as
        long as the median, which is `compute_seconds`.

        Args:
            compute_seconds: of this rank's device for what all have the same of, in a step of the
                interval; None on every rank where that was not timed.
        """
        seconds = time.perf_counter() - self._started
        rate = self.steps * self._global_batch / seconds
        mine = (self._data_seconds / seconds, self._others_seconds, compute_seconds)
        everyone = self._world.gather(mine)
        waits = [min(1.0, wait) for wait, _, _ in everyone]
        others = [seconds for _, seconds, _ in everyone]
        slowest = min(range(len(others)), key=others.__getitem__)
        lag = max(others) - others[slowest]
        values = {
            "samples_per_second": rate,
            "samples_per_second_per_rank": rate / self._world.size,
            "data_wait_fraction": sum(waits) / len(waits),
            "data_wait_fraction_max": max(waits),
            "slowest_rank": slowest,
            "slowest_host": self._world.hosts[slowest],
            "straggler_seconds": lag / max(1, self.steps),
        }
        notes = []
        if self._world.size > 1 and self.steps > 1 and lag > self._factor * seconds:
            notes.append(
                f"slow: the others waited {lag / seconds:.0%} of the time for "
                f"{self._world.name_of(slowest)}, which itself waited {waits[slowest]:.0%} for data"
            )
        computed = [own for _, _, own in everyone if own is not None]
        if len(computed) == self._world.size > 1:
            values |= self._devices(computed, notes)
        self.restart()
        return values, notes

    def _devices(self, seconds: list[float], notes: list[str]) -> dict[str, Any]:
        """Compare ranks; a device is named that is slow again and again: one may be disturbed."""
        median = statistics.median_low(seconds)
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        times = seconds[slowest] / max(median, 1e-9)
        before, count = self._slow_device
        count = count + 1 if slowest == before else 1
        self._slow_device = (slowest, count) if times > 1 + self._factor else (-1, 0)
        if self._slow_device[1] >= SLOW_IN_A_ROW:
            notes.append(
                f"slow device: {self._world.name_of(slowest)} computes {times:.1f} times as long "
                "as the median"
            )
        return {
            "compute_seconds": median,
            "compute_slowest_rank": slowest,
            "compute_slowest_host": self._world.hosts[slowest],
            "compute_slowdown": times,
        }
