"""What asks a run to stop or to save: signals, the end of its launcher, files of a person, time."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from coca_scale.engine.leaving import leave
from coca_scale.engine.planned import first_on_node
from coca_scale.engine.processes import launchers
from coca_scale.recipe.exits import INTERRUPTED, REQUEUE
from coca_scale.recipe.text import tell

STOP_FILE = "STOP"
SAVE_FILE = "SAVE"
OF_CLUSTER = (signal.SIGUSR1, signal.SIGTERM)
OF_TERMINAL = (signal.SIGINT, signal.SIGHUP)
LOOK_SECONDS = 1.0
SAME_PRESS_SECONDS = 0.3
_OVER = 0  # no signal has this number


class Signals:
    """Signals to this rank, and the end of what launched it: asked once, a run saves and leaves.

    A thread hears of them, as the main one may be waiting for other ranks. As long as there is
    nothing to save (until `to_be_saved`) the process ends at once, and with a second Ctrl-C always.
    Verbs, which go on where they stopped when they are called again, have nothing to save.

    Attributes:
        reason: why this rank shall leave, None if nobody asked.
    """

    def __init__(self, whole_process: bool = True) -> None:
        """Without `whole_process` Ctrl-C and the terminal remain the business of the program."""
        self.reason: str | None = None
        self._numbers = OF_CLUSTER + OF_TERMINAL if whole_process else OF_CLUSTER
        self._nothing_to_save = whole_process
        self._asking = threading.Lock()
        self._interrupted: float | None = None
        self._launchers = [(process, process.name) for process in launchers()]
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in self._numbers:
            # nohup, and shells for what they start in the background, have it ignored
            if number in OF_CLUSTER or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, _left_to_the_thread)
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._woken_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._woken_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.write(self._write, bytes([_OVER]))
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def to_be_saved(self) -> None:
        """From now on there is something to save before leaving."""
        self._nothing_to_save = False

    def agreed(self, reasons: Iterable[str | None]) -> None:
        """All ranks leave, for what one of them was asked for: the others may never hear of it."""
        self._ask(next(reason for reason in reasons if reason is not None))

    def _listen(self) -> None:
        while True:
            if select.select([self._read], [], [], LOOK_SECONDS)[0]:
                for number in os.read(self._read, 256):
                    if number == _OVER:
                        return
                    if number in self._before:
                        self._signalled(signal.Signals(number))
            gone = next((name for process, name in self._launchers if not process.alive), None)
            if gone is not None:
                self._ask(f"{gone}, which launched this rank, is gone")

    def _signalled(self, number: signal.Signals) -> None:
        self._ask(number.name)
        if number is signal.SIGINT:
            first = self._interrupted = self._interrupted or time.monotonic()
            if time.monotonic() - first > SAME_PRESS_SECONDS:  # programs pass on what the group got
                self._say("SIGINT again: leaving at once")
                leave(INTERRUPTED)

    def _ask(self, reason: str) -> None:
        with self._asking:
            if self.reason is not None:
                return
            if self._nothing_to_save:
                self._say(f"{reason}: leaving at once, with nothing to save")
                leave(REQUEUE)
            self.reason = reason
        again = "; Ctrl-C again leaves at once" if reason == signal.SIGINT.name else ""
        self._say(f"{reason}: saving and leaving after this step{again}")

    def _say(self, message: str) -> None:
        if first_on_node():
            tell(message)


def _left_to_the_thread(_: int, __: FrameType | None) -> None:
    """Python writes the number to the wakeup descriptor before it comes here."""


@dataclass(frozen=True)
class Asked:
    """What one rank was asked for; a run does what any of its ranks was asked for.

    Attributes:
        leave: save, end, and let the job be started again.
        stop: save and end for good.
        save: save and go on.
    """

    leave: bool = False
    stop: bool = False
    save: bool = False


class Requests:
    """Collects requests on this rank; rank 0 also looks at files and the clock."""

    def __init__(
        self, folder: Path, save_minutes: float | None, rank: int, signals: Signals | None
    ) -> None:
        self._folder = folder
        self._minutes = save_minutes
        self._first = rank == 0
        self._signals = signals
        self._saved_at = time.monotonic()

    def saved(self) -> None:
        """A save has begun, for whatever reason."""
        self._saved_at = time.monotonic()

    def poll(self) -> Asked:
        """What this rank has been asked for since the last call; signals stay."""
        leave_now = self._signals is not None and self._signals.reason is not None
        if not self._first:
            return Asked(leave=leave_now)
        minutes = (time.monotonic() - self._saved_at) / 60
        due = self._minutes is not None and minutes >= self._minutes
        return Asked(
            leave=leave_now,
            stop=(self._folder / STOP_FILE).exists(),
            save=due or (self._folder / SAVE_FILE).exists(),
        )

    def answered(self, asked: Asked) -> None:
        """Remove the files that have been obeyed, so that the next start does not obey again."""
        if self._first and asked.stop:
            (self._folder / STOP_FILE).unlink(missing_ok=True)
        if self._first and asked.save:
            (self._folder / SAVE_FILE).unlink(missing_ok=True)
