"""What asks a run to stop or to save: signals of the cluster, files of a person, the clock."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

STOP_FILE = "STOP"
SAVE_FILE = "SAVE"
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


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

    def __init__(self, folder: Path, save_minutes: float | None, rank: int) -> None:
        self._folder = folder
        self._minutes = save_minutes
        self._first = rank == 0
        self._signal: int | None = None
        self._before: dict[int, Any] = {}
        self._saved_at = time.monotonic()

    def __enter__(self) -> Requests:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._signal is None:
            name = signal.Signals(number).name
            os.write(sys.stderr.fileno(), f"{name}: saving and leaving after this step\n".encode())
        self._signal = number

    def saved(self) -> None:
        """A save has begun, for whatever reason."""
        self._saved_at = time.monotonic()

    def poll(self) -> Asked:
        """What this rank has been asked for since the last call; signals stay."""
        if not self._first:
            return Asked(leave=self._signal is not None)
        minutes = (time.monotonic() - self._saved_at) / 60
        due = self._minutes is not None and minutes >= self._minutes
        return Asked(
            leave=self._signal is not None,
            stop=(self._folder / STOP_FILE).exists(),
            save=due or (self._folder / SAVE_FILE).exists(),
        )

    def answered(self, asked: Asked) -> None:
        """Remove the files that have been obeyed, so that the next start does not obey again."""
        if self._first and asked.stop:
            (self._folder / STOP_FILE).unlink(missing_ok=True)
        if self._first and asked.save:
            (self._folder / SAVE_FILE).unlink(missing_ok=True)
