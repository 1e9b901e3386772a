"""Processes with a time limit: none of them can hold up who started them, nor outlive it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.05
GRACE_SECONDS = 3.0  # for the others to end by themselves after one has failed
_EXCEPTION = re.compile(r"^[\w.]*(Error|Exception)\b")


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        out: what it wrote to stdout.
        fault: None if it went well, else one line that says why not.
    """

    out: str
    fault: str | None


def run(commands: Sequence[Sequence[str]], limit_seconds: float) -> list[Ended]:
    """Run all commands at once; when one fails, or time is up, all are killed with their children.

    Raises:
        OSError: a command cannot be started.
    """
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder, f"{i}.out") for i in range(len(commands))]
        errs = [Path(folder, f"{i}.err") for i in range(len(commands))]
        children: list[subprocess.Popen[bytes]] = []
        late = False
        try:
            for command, out, err in zip(commands, outs, errs, strict=True):
                children.append(_start(command, out, err))
            late = not _wait(children, limit_seconds)
        finally:
            killed = [_kill(child) for child in children]
        ended = []
        for child, out, err, was_running in zip(children, outs, errs, killed, strict=True):
            fault = None
            if was_running:
                fault = f"no end after {limit_seconds:.0f} s" if late else "another process failed"
            elif child.returncode:
                fault = _reason(err, child.returncode)
            ended.append(Ended(out.read_text(errors="replace"), fault))
        return ended


def _start(command: Sequence[str], out: Path, err: Path) -> subprocess.Popen[bytes]:
    """In a session of its own, so that it can be killed with all that it started."""
    with out.open("w") as out_file, err.open("w") as err_file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out_file,
            stderr=err_file,
            start_new_session=True,
        )


def _wait(children: Sequence[subprocess.Popen[bytes]], limit_seconds: float) -> bool:
    """Until all have ended or one failed; False if that took too long."""
    deadline = time.monotonic() + limit_seconds
    failed = False
    while any(child.poll() is None for child in children):
        if not failed and any(child.poll() for child in children):
            failed = True
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            return failed
        time.sleep(POLL_SECONDS)
    return True


def _kill(child: subprocess.Popen[bytes]) -> bool:
    """End a process and all it started; returns whether it was still running."""
    running = child.poll() is None
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    child.wait()
    return running


def _reason(err: Path, code: int) -> str:
    """The exception's line of a traceback, else the last line, else the exit code."""
    text = err.read_text(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if _EXCEPTION.match(line)]
    text = (named or lines or [f"exit code {code}"])[-1]
    return text if len(text) <= 200 else text[:199] + "…"
