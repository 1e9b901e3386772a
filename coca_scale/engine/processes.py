"""Processes of this machine that a rank depends on: those that launched it, and ranks beside it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from coca_scale.engine.planned import rank_variable

PROC = Path("/proc")
SHELLS = {"sh", "ash", "bash", "busybox", "csh", "dash", "fish", "ksh", "tcsh", "zsh"}
_INIT = 1


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
        fields = _stat(pid)
        return cls(pid, int(fields[19])) if fields is not None else None

    @property
    def alive(self) -> bool:
        """Whether it runs, or could; one that waits for its parent to look at it does not."""
        fields = _stat(self.pid)
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
        fields = _stat(self.pid)
        return fields is not None and (int(fields[19]) != self.started or fields[0] in "ZX")

    @property
    def name(self) -> str:
        """What a person started it as."""
        words = _words(self.pid, "cmdline")
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


def launchers() -> list[Process]:
    """Those of this process's ancestors without which it is nobody's job any more.

    One is the nearest ancestor that does not have this rank's number in its environment, and so has
    given it: DeepSpeed's launch, torchrun, mpirun, orted, slurmstepd. Others are those with this
    process's own command at the end of theirs: the `deepspeed` above the launch, mpirun, timeout.
    A shell is none: it may end and leave what it started in the background on purpose.
    """
    variable, found = rank_variable(), list[Process]()
    given = variable is None
    setting = f"{variable}={os.environ[variable]}" if variable is not None else ""
    pid = os.getppid()
    while pid > _INIT and (process := Process.at(pid)) is not None:
        gave = not given and setting not in _words(pid, "environ")
        given = given or gave
        if (gave or _has_our_command(_words(pid, "cmdline"))) and not _is_shell(pid):
            found.append(process)
        fields = _stat(pid)
        pid = int(fields[1]) if fields is not None else 0
    return found


def _has_our_command(words: list[str]) -> bool:
    ours = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    before = len(words) - len(ours) - 1
    if before < 0 or words[before + 1 :] != ours:
        return False
    return _stem(words[before]) == _stem(sys.argv[0])


def _stem(script: str) -> str:
    """`train` of `coca_scale/train.py` and of `coca_scale.train`."""
    return script.removesuffix(".py").replace("/", ".").split(".")[-1]


def _is_shell(pid: int) -> bool:
    try:
        return (PROC / str(pid) / "exe").readlink().name in SHELLS
    except OSError:  # somebody else's
        return False


def _stat(pid: int) -> list[str] | None:
    """State, parent and so on; what is before them may contain anything."""
    try:
        return (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _words(pid: int, file: str) -> list[str]:
    """Of a command line or an environment; none if they are not to be seen."""
    try:
        content = (PROC / str(pid) / file).read_bytes()
    except OSError:
        return []
    return content.decode(errors="surrogateescape").split("\0")[:-1]
