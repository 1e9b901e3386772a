"""A thread per rank that ends the run when a rank dies, fails or hangs, and says which and where.

Collectives wait for ranks that are gone, and then every rank complains about its neighbour. The
threads talk through the job's key-value store instead, which works while collectives do not: every
rank leaves a sign of life there, the first failure is written once, and all others end quietly.

That a process died is told by its witness (`engine/leaving.py`), whoever it was; the ranks beside
it see it gone and end. So does the rank that keeps the store, without which nobody can write.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

import torch.distributed as dist

from coca_scale.engine.launch import (
    connect_store,
    is_the_launchers_store,
    store_is_gone,
)
from coca_scale.engine.leaving import leave, told
from coca_scale.engine.world import World
from coca_scale.recipe.exits import CRASHED
from coca_scale.recipe.process import Process, machine
from coca_scale.recipe.run_folder import STACKS
from coca_scale.recipe.text import tell

BEAT_SECONDS = 2.0
LOOK_SECONDS = 0.5
DEAD_AFTER_SECONDS = 30.0  # silent for so long while a rank has lost contact to one
ASLEEP_SECONDS = 10.0
STUCK_ANSWERS_SECONDS = 6.0
STORE_SECONDS = 10.0
FAILURE = "failure"
LOST = "lost"
ALL_OVER = "all over"
WAITS = "waits in "
LOST_CONTACT = ("closed by peer", "reset by peer", "nccl", "gloo", "timed out", "aborted")
T = TypeVar("T")
_STORE_FAULTS = (dist.DistNetworkError, dist.DistStoreError)


class Watchdog:
    """Watches this rank's main thread; on rank 0 the others' signs of life, on rank 1 rank 0's."""

    def __init__(
        self,
        world: World,
        folder: Path,
        silence_seconds: float,
        on_failure: Callable[[Sequence[int], str], None] | None = None,
    ) -> None:
        """Start to watch.

        Args:
            world: the ranks.
            folder: of the run; stacks of a hang are written into `folder`/stacks.
            silence_seconds: longest time without a sign of life.
            on_failure: called by the rank that tells the failure, or by each that cannot know
                whether another one does; with the ranks at fault, if they are known, and the words.
        """
        self._world = world
        self._folder = folder / STACKS
        self._silence = silence_seconds
        self._on_failure = on_failure
        self._main = threading.main_thread().ident
        self._phase: tuple[str, float, float] | None = None
        self._stopped = threading.Event()
        self._store = self._connect()
        self._store_lost = False
        self._store.set(f"beat/{world.rank}", repr(time.time()))
        here = Process.at(os.getpid())
        if here is not None:
            self._store.set(f"process/{world.rank}", json.dumps([machine(), *astuple(here)]))
        same_host = {r for r, host in enumerate(world.hosts) if host == world.hosts[world.rank]}
        self._unknown = same_host - {world.rank}
        self._beside: dict[int, Process] = {}  # ranks of this machine
        self._answered = self._awake = time.monotonic()
        watched = {0: range(1, world.size), 1: range(1)}.get(world.rank, ())
        self._beats = dict.fromkeys(watched, (b"", self._awake))  # one may vanish before its first
        # two threads, as an answer of the store may take for ever
        self._threads = [
            threading.Thread(target=loop, name=f"watchdog {name}", daemon=True)
            for name, loop in (("talks", self._talk), ("looks", self._look))
        ]
        for thread in self._threads:
            thread.start()

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
        """The run is over on this rank; it waits for the others, who would find it dead."""
        self._be_still()

        def part() -> None:
            if self._store.add("over", 1) == self._world.size:
                self._store.set(ALL_OVER, "")
            self._store.wait([ALL_OVER])

        _in_time(part, None)

    def fail(self, error: BaseException) -> NoReturn:
        """End this process after an unexpected error, which is told if it was the first."""
        rank, text = self._world.rank, told(error)
        name, at_fault = self._world.name_of(rank), [rank]
        words = f"{name} failed first:\n{text}"
        if any(word in str(error).lower() for word in LOST_CONTACT):
            # who is really at fault may still say so, or be found out: the threads go on meanwhile,
            # and end this process once the cause is known
            _in_time(lambda: self._store.set(LOST, ""), None)
            time.sleep(DEAD_AFTER_SECONDS + 3 * BEAT_SECONDS)
            words = f"{name} lost contact to another rank, which said nothing:\n{text}"
            at_fault = []
        self._be_still()
        self._end(words if self._publish(words, at_fault) else None)

    def _be_still(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(STORE_SECONDS)

    def _end(self, message: str | None) -> NoReturn:
        if message is not None:
            tell(f"coca-scale: {message}")
        if self._world.rank == 0:
            time.sleep(3 * BEAT_SECONDS)  # let the others read it before the store goes
        leave(CRASHED)

    def _publish(self, text: str, at_fault: Sequence[int]) -> bool:
        """Write the failure; whether there was none before, as far as one can know."""
        mine = f"{self._world.rank}\n{text}"
        known: bytes = _in_time(lambda: self._store.compare_set(FAILURE, "", mine), mine.encode())
        first = known.decode() == mine
        if first:
            self._hand_on(text, at_fault)
        return first

    def _hand_on(self, text: str, at_fault: Sequence[int]) -> None:
        if (hand_on := self._on_failure) is not None:
            _in_time(lambda: hand_on(at_fault, text), None)  # it may write to a disk that hangs

    def _connect(self) -> dist.Store:
        return dist.PrefixStore("health", connect_store(STORE_SECONDS))

    def _talk(self) -> None:
        """Tell the others that this rank is there, and hear of them."""
        while not self._stopped.wait(BEAT_SECONDS):
            try:
                if self._store_lost:
                    self._store = self._connect()
                self._store.set(f"beat/{self._world.rank}", repr(time.time()))
                self._meet_neighbours()
                self._look_at_signs_of_life()
                if self._store.check([FAILURE]):
                    self._end(None)
                self._answered, self._store_lost = time.monotonic(), False
            except _STORE_FAULTS:
                self._store_lost = True

    def _meet_neighbours(self) -> None:
        for r in sorted(self._unknown):
            if self._store.check([f"process/{r}"]):
                self._unknown.discard(r)
                where, *process = json.loads(self._store.get(f"process/{r}"))
                if where == machine() != "":
                    self._beside = {**self._beside, r: Process(*process)}

    def _look_at_signs_of_life(self) -> None:
        """Publish who has given none.

        Rank 1 looks after rank 0: others see that its store is gone, but a launcher may keep that.
        """
        if not self._beats:
            return
        there = [r for r, (beat, _) in self._beats.items() if beat or self._has_begun(r)]
        # one message for all; without a key torch waits for what nobody answers
        values = self._store.multi_get([f"beat/{r}" for r in there]) if there else []
        now = time.monotonic()
        for r, value in zip(there, values, strict=True):
            if self._beats[r][0] != value:
                self._beats[r] = (value, now)
        limit = self._silence
        if self._store.check([LOST]):
            limit = min(limit, DEAD_AFTER_SECONDS)
        silent = [r for r, (_, at) in self._beats.items() if now - max(at, self._awake) > limit]
        if silent:
            named = ", ".join(self._world.name_of(r) for r in silent[:8])
            text = _no_sign_of_life(named, limit)
            if self._publish(text, silent):
                self._end(text)

    def _has_begun(self, rank: int) -> bool:
        return bool(self._store.check([f"beat/{rank}"]))

    def _look(self) -> None:
        """What can be seen without the others' help."""
        last = time.monotonic()
        while not self._stopped.wait(LOOK_SECONDS):
            asleep, last = time.monotonic() - last - LOOK_SECONDS, time.monotonic()
            if asleep > ASLEEP_SECONDS:
                self._wake_up(asleep)
            for r, process in self._beside.items():
                if not process.alive:  # its witness says so
                    self._publish(f"{self._world.name_of(r)} is dead", [r])
                    self._end(None)
            if self._phase is not None and time.monotonic() > self._phase[1]:
                self._report_hang(self._phase[0], self._phase[2])
            silent = time.monotonic() - max(self._answered, self._awake) > self._silence
            if (silent or (self._store_lost and store_is_gone())) and not is_the_launchers_store():
                self._end_without_store()

    def _wake_up(self, asleep: float) -> None:
        """This rank was suspended, perhaps all of them: nobody is late for that."""
        self._awake = time.monotonic()
        if self._phase is not None:
            name, deadline, seconds = self._phase
            self._phase = (name, deadline + asleep, seconds)

    def _end_without_store(self) -> NoReturn:
        """Rank 0, which keeps the store, is stopped or gone, perhaps with its node and witness."""
        keeper = self._world.name_of(0)
        if not store_is_gone():
            tells = self._world.rank == 1
            text = _no_sign_of_life(keeper, self._silence)
        else:
            hosts = self._world.hosts
            elsewhere = (r for r, host in enumerate(hosts) if host != hosts[0])
            tells = self._world.rank == next(elsewhere, None)
            text = f"{keeper} is gone; all ranks end"
        if tells:
            self._hand_on(text, [0])
        else:
            time.sleep(2 * BEAT_SECONDS)  # who tells must not find this rank dead first
        self._end(text if tells else None)

    def _report_hang(self, phase: str, seconds: float) -> NoReturn:
        """Every rank writes its stacks, and the first to have all answers tells them."""
        rank = self._world.rank
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"rank_{rank:05d}.txt").open("w") as file:
            tell(f"{self._world.name_of(rank)}, {phase}, {time.ctime()}", file)
            faulthandler.dump_traceback(file)
        mine = json.dumps([phase, self._whereabouts()])
        _in_time(lambda: self._store.set(f"stuck/{rank}", mine), None)
        time.sleep(STUCK_ANSWERS_SECONDS)
        answers = _in_time(self._stuck_answers, dict[int, str]())
        whereabouts: dict[str, list[int]] = {}
        for r in range(self._world.size):
            whereabouts.setdefault(answers.get(r, "does not answer"), []).append(r)
        lines = [f"no progress for {seconds:.0f} s in {phase}; stacks are in {self._folder}"]
        for found, ranks in sorted(whereabouts.items(), key=lambda item: len(item[1])):
            named = ", ".join(self._world.name_of(r) for r in ranks[:8])
            lines.append(f"  {named}{', …' if len(ranks) > 8 else ''}: {found}")
        text = "\n".join(lines)
        self._end(text if self._publish(text, _odd_ones_out(whereabouts)) else None)

    def _stuck_answers(self) -> dict[int, str]:
        answers = {}
        for r in range(self._world.size):
            if self._store.check([f"stuck/{r}"]):
                at, where = json.loads(self._store.get(f"stuck/{r}"))
                answers[r] = f"{where} during {at}"
        return answers

    def _whereabouts(self) -> str:
        """The collective that the main thread waits in, or its innermost line, and our code."""
        assert self._main is not None
        frame = sys._current_frames().get(self._main)
        return describe(frame) if frame is not None else "no main thread"


def _odd_ones_out(whereabouts: Mapping[str, Sequence[int]]) -> list[int]:
    """Ranks that wait in no collective while others do, else all but the many in one place.

    Args:
        whereabouts: ranks by where they are, as `describe` says it.

    Returns:
        None of them where no more ranks are in one place than in another.
    """
    ranks_of = sorted(whereabouts.items(), key=lambda item: -len(item[1]))
    outside = [r for where, ranks in ranks_of if not where.startswith(WAITS) for r in ranks]
    if 0 < len(outside) < sum(len(ranks) for _, ranks in ranks_of):
        return sorted(outside)
    (_, crowd), *others = ranks_of
    if others and len(others[0][1]) == len(crowd):
        return []
    return sorted(r for _, ranks in others for r in ranks)


def _no_sign_of_life(named: str, seconds: float) -> str:
    return f"{named}: no sign of life for {seconds:.0f} s (stopped? node down?); all ranks end"


def describe(frame: FrameType) -> str:
    """Where a thread is: the collective and the line of this package that called it."""
    stack = traceback.extract_stack(frame)
    collective = next((f.name for f in stack if f.filename.endswith("distributed_c10d.py")), None)
    ours = next((f for f in reversed(stack) if "coca_scale" in f.filename), stack[-1])
    at = f"{Path(ours.filename).name}:{ours.lineno} {ours.name}"
    if collective is not None:
        return f"{WAITS}{collective} ← {at}"
    return f"is at {Path(stack[-1].filename).name}:{stack[-1].lineno} {stack[-1].name} ← {at}"


def _in_time(action: Callable[[], T], otherwise: T) -> T:
    """What `action` returns, or `otherwise` if the store is gone or does not answer."""
    found = [otherwise]

    def ask() -> None:
        with contextlib.suppress(*_STORE_FAULTS):
            found[0] = action()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(STORE_SECONDS)
    return found[0]


class NoWatchdog:
    """Where nobody watches: a run inside another program, which keeps its own order."""

    @contextmanager
    def phase(self, *_: object) -> Iterator[None]:
        """Nothing is limited."""
        yield
