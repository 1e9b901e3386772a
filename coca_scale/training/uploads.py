"""Threads that copy a checkpoint's files behind a run."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYetError
from pathlib import Path
from typing import Any, TypeVar

from coca_scale.engine.writing import Entries
from coca_scale.errors import UserError, system_faults
from coca_scale.training.mirrored import MirroredRun

T = TypeVar("T")
_Task = tuple[Future[Any], Callable[[], Any]]


class Hands:
    """Threads that take tasks in their order, and do not keep a process from ending."""

    def __init__(self, number: int, name: str) -> None:
        self._number, self._name = number, name
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def do(self, task: Callable[[], T]) -> Future[T]:
        """Have a task done; what the operating system refuses it is a UserError in its result."""
        while len(self._threads) < self._number:  # with the first task
            thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._threads.append(thread)
            thread.start()
        done: Future[T] = Future()
        self._tasks.put((done, task))
        return done

    def close(self) -> None:
        """Let the threads go once they have done what they have."""
        for _ in self._threads:
            self._tasks.put(None)

    def _work(self) -> None:
        while (given := self._tasks.get()) is not None:
            done, task = given
            try:
                with system_faults():
                    done.set_result(task())
            except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
                done.set_exception(error)
            del given, done, task


class Upload:
    """This rank's files of a checkpoint on their way.

    Attributes:
        checkpoint: its folder.
        begun: when, of `time.monotonic`.
    """

    def __init__(
        self, run: MirroredRun, checkpoint: Path, mine: Entries, there: bool, hands: Hands
    ) -> None:
        """Begin.

        Args:
            run: where they go.
            checkpoint: folder of a complete one.
            mine: what this rank copies of it.
            there: whether another checkpoint may be there under its name; that is none from now on.
            hands: who copy.
        """
        self.checkpoint = checkpoint
        self.begun = time.monotonic()
        self._run = run
        self._given_up = False
        withdrawn = hands.do(lambda: run.withdraw(checkpoint.name) if there else None)

        def put(file: str) -> None:
            withdrawn.result()
            if not self._given_up:
                try:
                    run.put(checkpoint, file)
                except UserError:
                    self._given_up = True
                    raise

        largest_first = sorted(mine, key=lambda file: -int(mine[file]["bytes"]))
        puts = [hands.do(lambda file=file: put(file)) for file in largest_first]  # type: ignore[misc]
        self._tasks = [withdrawn, *puts]

    @property
    def done(self) -> bool:
        """Whether nothing more is copied."""
        return all(task.done() for task in self._tasks)

    def wait(self, deadline: float) -> None:
        """Until it is done, or until `deadline` of `time.monotonic`."""
        for task in self._tasks:
            if failure_of(task, deadline) is not None:
                return

    def failure(self) -> str | None:
        """Why a file is not there; one that is still on its way is given up."""
        failures = (failure_of(task, 0.0) for task in self._tasks)
        found = next((failure for failure in failures if failure is not None), None)
        self._given_up = found is not None
        return found


def failure_of(task: Future[Any], deadline: float) -> str | None:
    """Why a task failed, once it is through or `deadline` of `time.monotonic` is; None if well."""
    try:
        task.result(max(0.0, deadline - time.monotonic()))
    except NotYetError:
        return "it was not through in time"
    except UserError as error:
        return str(error)
    return None
