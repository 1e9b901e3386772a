"""A thread per rank that ends the run when a rank dies, fails or hangs, and says which and where.

Collectives wait for ranks that are gone, and then every rank complains about its neighbour. The
threads talk through the job's key-value store instead, which works while collectives do not: every
rank leaves a sign of life there, the first failure is written once, and all others end quietly.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch.distributed as dist

from coca_scale.engine.launch import connect_store
from coca_scale.engine.world import World
from coca_scale.recipe.exits import CRASHED
from coca_scale.recipe.run_folder import STACKS

BEAT_SECONDS = 2.0
DEAD_AFTER_SECONDS = 30.0
STUCK_ANSWERS_SECONDS = 6.0
STORE_SECONDS = 10.0
FAILURE = "failure"
LOST_CONTACT = ("closed by peer", "reset by peer", "nccl", "gloo", "timed out", "aborted")


class Watchdog:
    """Watches this rank's main thread and, on rank 0, the signs of life of all ranks."""

    def __init__(self, world: World, folder: Path) -> None:
        """Stacks of a hang are written into `folder`/stacks."""
        self._world = world
        self._folder = folder / STACKS
        self._main = threading.main_thread().ident
        self._phase: tuple[str, float, float] | None = None
        self._stopped = threading.Event()
        self._store = dist.PrefixStore("health", connect_store(STORE_SECONDS))
        self._seen: set[int] = set()
        self._beats: dict[int, tuple[bytes, float]] = {}
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def phase(self, name: str, seconds: float) -> Iterator[None]:
        """The block must be through in `seconds`; blocks inside it have limits of their own."""
        outer = self._phase
        self._phase = (name, time.monotonic() + seconds, seconds)
        try:
            yield
        finally:
            self._phase = outer
            if outer is not None:  # what was inside does not count
                self._phase = (outer[0], time.monotonic() + outer[2], outer[2])

    def stop(self) -> None:
        """The run is over on this rank."""
        self._stopped.set()
        self._thread.join()

    def fail(self, error: BaseException) -> NoReturn:
        """End this process after an unexpected error, which is told if it was the first."""
        text = "".join(traceback.format_exception(error)).rstrip()
        told = f"{self._world.name_of(self._world.rank)} failed first:\n{text}"
        try:
            if any(word in str(error).lower() for word in LOST_CONTACT):
                # who is really at fault may still say so, or be found out: the thread goes on
                # meanwhile, and ends this process once the cause is known
                time.sleep(DEAD_AFTER_SECONDS + 3 * BEAT_SECONDS)
                told = (
                    f"{self._world.name_of(self._world.rank)} lost contact to another rank, which "
                    f"said nothing:\n{text}"
                )
            self._stopped.set()
            self._thread.join()
            first = self._publish(told)
        except (dist.DistNetworkError, dist.DistStoreError):
            first = True  # rank 0, which keeps the store, is gone too
        self._end(told if first else None)

    def _end(self, message: str | None) -> NoReturn:
        if message is not None:
            print(f"coca-scale: {message}", file=sys.stderr, flush=True)
        if self._world.rank == 0:
            time.sleep(3 * BEAT_SECONDS)  # let the others read it before the store goes
        os._exit(CRASHED)

    def _publish(self, text: str) -> bool:
        """Write the failure; whether there was none before."""
        mine = f"{self._world.rank}\n{text}"
        known: bytes = self._store.compare_set(FAILURE, "", mine)
        return known.decode() == mine

    def _watch(self) -> None:
        lost_since = None
        last = time.monotonic()
        while not self._stopped.wait(BEAT_SECONDS):
            asleep, last = time.monotonic() - last - BEAT_SECONDS, time.monotonic()
            if asleep > DEAD_AFTER_SECONDS / 3:
                self._wake_up(asleep)
            try:
                self._store.set(f"beat/{self._world.rank}", repr(time.time()))
                self._look_at_others()
                if self._store.check([FAILURE]):
                    self._end(None)
                if self._phase is not None and time.monotonic() > self._phase[1]:
                    self._report_hang(self._phase[0], self._phase[2])
                lost_since = None
            except (dist.DistNetworkError, dist.DistStoreError):
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > DEAD_AFTER_SECONDS:
                    name = self._world.name_of(0)
                    self._end(
                        f"{name}, or the launcher there, is gone; ended by rank {self._world.rank}"
                    )

    def _wake_up(self, asleep: float) -> None:
        """The job was suspended, all of it: nobody is late for that."""
        self._beats.clear()
        if self._phase is not None:
            name, deadline, seconds = self._phase
            self._phase = (name, deadline + asleep, seconds)

    def _look_at_others(self) -> None:
        """Rank 0 publishes who has given no sign of life."""
        if self._world.rank != 0:
            return
        now = time.monotonic()
        for r in set(range(self._world.size)) - self._seen:
            if self._store.check([f"beat/{r}"]):
                self._seen.add(r)
        there = sorted(self._seen)
        values = self._store.multi_get([f"beat/{r}" for r in there])  # one message for all
        for r, value in zip(there, values, strict=True):
            if r not in self._beats or self._beats[r][0] != value:
                self._beats[r] = (value, now)
        silent = [r for r, (_, at) in self._beats.items() if now - at > DEAD_AFTER_SECONDS and r]
        if silent:
            named = ", ".join(self._world.name_of(r) for r in silent[:8])
            text = (
                f"{named}: no sign of life for {DEAD_AFTER_SECONDS:.0f} s (killed? out of memory? "
                "node down?); all ranks end"
            )
            if self._publish(text):
                self._end(text)

    def _report_hang(self, phase: str, seconds: float) -> NoReturn:
        """Every rank writes its stacks, and the first to have all answers tells them."""
        rank = self._world.rank
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"rank_{rank:05d}.txt").open("w") as file:
            print(f"{self._world.name_of(rank)}, {phase}, {time.ctime()}", file=file, flush=True)
            faulthandler.dump_traceback(file)
        self._store.set(f"stuck/{rank}", json.dumps([phase, self._whereabouts()]))
        time.sleep(STUCK_ANSWERS_SECONDS)
        whereabouts: dict[str, list[int]] = {}
        for r in range(self._world.size):
            found = "does not answer"
            if self._store.check([f"stuck/{r}"]):
                at, where = json.loads(self._store.get(f"stuck/{r}"))
                found = f"{where} during {at}"
            whereabouts.setdefault(found, []).append(r)
        lines = [f"no progress for {seconds:.0f} s in {phase}; stacks are in {self._folder}"]
        for found, ranks in sorted(whereabouts.items(), key=lambda item: len(item[1])):
            named = ", ".join(self._world.name_of(r) for r in ranks[:8])
            lines.append(f"  {named}{', …' if len(ranks) > 8 else ''}: {found}")
        text = "\n".join(lines)
        self._end(text if self._publish(text) else None)

    def _whereabouts(self) -> str:
        """The collective that the main thread waits in, or its innermost line, and our code."""
        assert self._main is not None
        frame = sys._current_frames().get(self._main)
        return describe(frame) if frame is not None else "no main thread"


def describe(frame: FrameType) -> str:
    """Where a thread is: the collective and the line of this package that called it."""
    stack = traceback.extract_stack(frame)
    collective = next((f.name for f in stack if f.filename.endswith("distributed_c10d.py")), None)
    ours = next((f for f in reversed(stack) if "coca_scale" in f.filename), stack[-1])
    at = f"{Path(ours.filename).name}:{ours.lineno} {ours.name}"
    if collective is not None:
        return f"waits in {collective} ← {at}"
    return f"is at {Path(stack[-1].filename).name}:{stack[-1].lineno} {stack[-1].name} ← {at}"


class NoWatchdog:
    """Where nobody watches: a run inside another program, which keeps its own order."""

    @contextmanager
    def phase(self, *_: object) -> Iterator[None]:
        """Nothing is limited."""
        yield
