"""Processes of this machine that a rank depends on: those that launched it, and ranks beside it."""

from __future__ import annotations

import os
import sys

from coca_scale.engine.planned import rank_variable
from coca_scale.recipe.process import PROC, Process, stat_of, words_of

SHELLS = {"sh", "ash", "bash", "busybox", "csh", "dash", "fish", "ksh", "tcsh", "zsh"}
_INIT = 1


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
        gave = not given and setting not in words_of(pid, "environ")
        given = given or gave
        if (gave or _has_our_command(words_of(pid, "cmdline"))) and not _is_shell(pid):
            found.append(process)
        fields = stat_of(pid)
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
