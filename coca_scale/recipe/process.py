"""Processes of this machine, told from later ones that got their numbers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """A process, and no later one that got its number.

    Attributes:
        pid: its number.
        started: when, in ticks since the machine started.
    """

    pid: int
    started: int

    @classmethod
    def at(cls, pid: int) -> Process | None:
        """The one that has this number now; None if there is none, or none to be seen."""
        fields = stat_of(pid)
        return cls(pid, int(fields[19])) if fields is not None else None

    @property
    def alive(self) -> bool:
        """Whether it runs, or could; one that waits for its parent to look at it does not."""
        fields = stat_of(self.pid)
        return fields is not None and int(fields[19]) == self.started and fields[0] not in "ZX"

    @property
    def gone(self) -> bool:
        """Whether it has surely ended; of another user's process /proc may say nothing."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        fields = stat_of(self.pid)
        return fields is not None and (int(fields[19]) != self.started or fields[0] in "ZX")

    @property
    def name(self) -> str:
        """What a person started it as."""
        words = words_of(self.pid, "cmdline")
        if words and Path(words[0]).name.startswith("python"):
            words = [word for word in words[1:] if not word.startswith("-")]
        return Path(words[0]).name if words else f"process {self.pid}"


def machine() -> str:
    """The same for two processes that see each other under their numbers; empty if unknown."""
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {(PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return ""


def stat_of(pid: int) -> list[str] | None:
    """State, parent and so on; what is before them may contain anything."""
    try:
        return (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def words_of(pid: int, file: str) -> list[str]:
    """Of a command line or an environment; none if they are not to be seen."""
    try:
        content = (PROC / str(pid) / file).read_bytes()
    except OSError:
        return []
    return content.decode(errors="surrogateescape").split("\0")[:-1]
