"""How a process of a job ends: its last words, and a witness in case it has none."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
from multiprocessing import parent_process
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import NoReturn

from coca_scale.engine.planned import planned_host, planned_rank
from coca_scale.recipe.process import PROC

_WITNESS = Path(__file__).with_name("witness.py")
_FRAMES = re.compile(r"^(Exception raised from |frame #\d+: |<omitting python frames>).*\n?", re.M)
_LOADER = "DataLoader worker (pid"


def appoint_witness() -> None:
    """From here on the death of this process is told by another one, unless it comes by `leave`."""
    name = f"rank {planned_rank()} on {planned_host()}"
    # of multiprocessing, for this process and those forked from it; not one of who forked this
    scratch = get_temp_dir() if parent_process() is None else ""
    witness = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_WITNESS), str(os.getpid()), name, scratch],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # who ends the ranks does not mean it
    )
    atexit.register(_dismiss, witness, os.getpid())
    _witnesses.append((witness, os.getpid(), scratch))


def leave(code: int) -> NoReturn:
    """End this process now, whatever its threads wait for, and what it has started with it."""
    for witness, owner, scratch in _witnesses:
        _dismiss(witness, owner)
        if scratch and owner == os.getpid():
            shutil.rmtree(scratch, ignore_errors=True)
    for child in _children():
        with contextlib.suppress(OSError):
            os.kill(child, signal.SIGTERM)
            os.kill(child, signal.SIGCONT)  # one that is stopped hears of it only then
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def told(error: BaseException) -> str:
    """The traceback of an error, without the frames of C++ that torch adds to its messages.

    Where a loader process died it is a line: torch raises that wherever the rank happens to be.
    """
    if str(error).startswith(_LOADER):
        known = error.__cause__ if str(error.__cause__).startswith(_LOADER) else error
        line = str(known).strip().rstrip(".")
        if "signal: " in line and not line.endswith("signal: Killed"):
            return line
        return (
            f"{line}, as where memory runs out and the kernel kills; fewer data.workers or a "
            "smaller data.shuffle_window take less"
        )
    return _FRAMES.sub("", "".join(traceback.format_exception(error))).rstrip()


_witnesses: list[tuple[subprocess.Popen[bytes], int, str]] = []  # and those of who forked this


def _dismiss(witness: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner:  # and no process forked from it
        witness.kill()
        witness.wait()


def _children() -> list[int]:
    """Of this process; none where the kernel does not say."""
    found: list[int] = []
    for file in PROC.glob("self/task/*/children"):
        with contextlib.suppress(OSError):
            found += map(int, file.read_text().split())
    return found
