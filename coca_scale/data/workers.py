"""Processes that do the work of a verb, and end with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from coca_scale.errors import UserError


@contextmanager
def working(count: int) -> Iterator[ProcessPoolExecutor]:
    """`count` processes, none of which outlives this one or works on for a block that has failed.

    Raises:
        UserError: one of them was killed.
    """
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, initializer=_belong)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise UserError(
            "a process was killed, as the kernel does where memory runs out; fewer --workers take "
            "less"
        ) from error
    except KeyboardInterrupt:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # not when it is through with its work
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _belong() -> None:
    """Ctrl-C means who has started this process; whose end, by whatever cause, is this one's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is a worker"

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="parent", daemon=True).start()
