"""A process that owns something and is slow, for as long as a test likes."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def stopped(process: subprocess.Popen, lock: Path) -> Iterator[None]:
    """Stop a process and its children, leaders of a session; its lock shows life all the same."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.2):
            os.utime(lock)

    thread = threading.Thread(target=beat)
    os.killpg(process.pid, signal.SIGSTOP)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        os.killpg(process.pid, signal.SIGCONT)
