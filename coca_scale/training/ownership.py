"""Who trains into a run folder: one job at a time, on shared file systems too.

RUN/lock/N.json says who has the folder, and the highest N counts. A number is created with O_EXCL,
so of jobs that start at the same moment one gets it, and none comes back: who wakes up after
another job took over finds a higher one. The owner touches its file every few seconds; others see
that the time of the file changes, and compare it with no clock.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from coca_scale.engine.processes import Process, machine
from coca_scale.engine.world import World
from coca_scale.errors import UserError
from coca_scale.recipe.files import read_json_as
from coca_scale.recipe.run_folder import LOCK
from coca_scale.recipe.text import tell, visible

BEAT_SECONDS = 5.0
WATCH_SECONDS = 60.0  # without a beat, after which an owner elsewhere counts as gone
_LOOK_SECONDS = 0.5
_NAME = re.compile(r"([0-9]+)\.json")
_Short = Annotated[str, Field(max_length=200)]


class Holder(BaseModel):
    """The process that has a run folder, as its file says.

    Attributes:
        host: name of its machine.
        boot: which start of which kernel it runs on.
        processes: name space in which `pid` is meant.
        pid: of rank 0.
        started: of this process, in clock ticks after the machine's start.
        job: of SLURM, with its cluster; None elsewhere.
        restart: how often SLURM has started the job again.
        since: when it took the folder, by its own clock; for people.
        released: it has ended in order.
    """

    model_config = ConfigDict(frozen=True)

    host: _Short
    boot: _Short
    processes: _Short
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    started: int
    job: _Short | None
    restart: int
    since: _Short
    released: bool = False

    def __str__(self) -> str:
        job = "" if self.job is None else f", SLURM job {self.job} start {self.restart}"
        return visible(f"process {self.pid} on {self.host}{job}, since {self.since}")

    def why_gone(self, me: Holder) -> str | None:
        """What tells process `me` at once that this one trains no more; None if nothing does."""
        if self.job is not None and self.job == me.job and self.restart < me.restart:
            return "an earlier start of this job"
        here = (self.host, self.boot, self.processes) == (me.host, me.boot, me.processes)
        if here and self.boot and Process(self.pid, self.started).gone:
            return "which is dead"
        return None


class Lock:
    """A run folder that this process has, and the thread that shows that it lives."""

    def __init__(self, place: Path, number: int, me: Holder) -> None:
        """Use `take`."""
        self._place = place
        self._number = number
        self._me = me
        self._busy = threading.Lock()
        self._ended = threading.Event()
        self._looked = _clock()
        self.lost: str | None = None
        self._thread = threading.Thread(target=self._live, name="owner", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, folder: Path, watch_seconds: float) -> Lock:
        """Get a run folder for this process, from an owner that is gone as well.

        Args:
            folder: of the run; made if it is not there.
            watch_seconds: how long an owner is watched of which nothing else is known.

        Raises:
            UserError: another process has it, or it cannot be written.
        """
        place, me = folder / LOCK, _this_process()
        try:
            place.mkdir(parents=True, exist_ok=True)
            while True:
                last = max(_numbers(place), default=0)
                note = _taking_over(place, last, me, watch_seconds) if last else None
                if not _create(_path(place, last + 1), me):
                    continue  # somebody else was faster
                if max(_numbers(place), default=0) == last + 1:  # a list of names may have been old
                    break
                _path(place, last + 1).unlink(missing_ok=True)
            for number in _numbers(place) - {last + 1}:
                _path(place, number).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"the run folder cannot be written: {error}") from error
        if note is not None:
            tell(note)
        return cls(place, last + 1, me)

    def holds(self) -> bool:
        """Whether no other process has taken the folder meanwhile. Looks at most twice a second."""
        if self.lost is None and _clock() - self._looked > _LOOK_SECONDS:
            self._beat()  # however short a suspension was, a job may have begun in it
        return self.lost is None

    def release(self) -> None:
        """Leave the folder to whoever wants it."""
        self._ended.set()
        self._thread.join(BEAT_SECONDS)
        self._beat()
        if self.lost is None:
            with suppress(OSError):  # then others find out that this process has ended
                _write(_path(self._place, self._number), self._me, released=True)

    def _live(self) -> None:
        while not self._ended.wait(BEAT_SECONDS) and self.lost is None:
            self._beat()

    def _beat(self) -> None:
        """Look whether the folder is still this process's, and show that it lives."""
        path = _path(self._place, self._number)
        with self._busy, suppress(OSError):  # a disk that is away for a while says nothing
            numbers = _numbers(self._place)
            if not numbers:  # somebody removed the folder, and took it over or not
                path.parent.mkdir(parents=True, exist_ok=True)
                _create(path, self._me)
            elif max(numbers) != self._number or _read(path) not in (self._me, None):
                new = _read(_path(self._place, max(numbers)))
                self.lost = (
                    f"{self._place.parent} was taken over by {new or 'another process'} while this "
                    "one did not answer; it ends, and writes nothing more"
                )
            else:
                os.utime(path)
            self._looked = _clock()


class Owner:
    """What the ranks of a job know of the ownership of their run folder.

    Args:
        lock: of rank 0; None where nobody locks: a loop inside another program, which keeps its
            own order.
        first: whether this is rank 0.
    """

    def __init__(self, lock: Lock | None, first: bool) -> None:
        self._lock = lock
        self._first = first

    def holds(self) -> bool:
        """Whether this process may write the run's own files: it is rank 0, and owner. Local."""
        return self._first and (self._lock is None or self._lock.holds())

    def require(self) -> None:
        """See that the folder has not been taken over, on rank 0; others are told by it. Local.

        Raises:
            UserError: it has been, and by whom.
        """
        if self._lock is not None and not self._lock.holds():
            raise UserError(str(self._lock.lost))


@contextmanager
def owned(folder: Path, world: World) -> Iterator[Owner]:
    """The run folder for the ranks of this job alone, while the block runs. A collective.

    Raises:
        AgreedError: another job has it.
    """
    taken: list[Lock] = []
    world.on_first(lambda: taken.append(Lock.take(folder, WATCH_SECONDS)))
    try:
        yield Owner(taken[0] if taken else None, world.rank == 0)
    finally:
        for lock in taken:
            lock.release()


def _taking_over(place: Path, number: int, me: Holder, seconds: float) -> str | None:
    """Wait until it is sure that owner `number` is gone; returns what is to be said about it.

    Raises:
        UserError: it is not.
    """
    folder, path = place.parent, _path(place, number)
    holder = _read(path)
    if holder is not None and holder.released:
        return None
    name = holder or "a process that did not write who it is"
    announcement = f"watching for {seconds:.0f} s whether {name} still trains into {folder}"
    why = _why_gone(path, holder, me, seconds, announcement)
    if why is not None:
        return f"taking over {folder} from {name}, {why}"
    now = _read(path)
    if path.exists() and not (now is not None and now.released):
        raise UserError(
            f"{folder} is in use by {now or name}: end that run (touch {folder}/STOP), or set "
            "another run.dir"
        )
    return None


def _why_gone(
    path: Path, holder: Holder | None, me: Holder, seconds: float, announcement: str
) -> str | None:
    """Why the owner that wrote `path` counts as gone; None once the file changes or is removed.

    Says the announcement if that takes longer than a beat.
    """
    before, began, announced = _state(path), time.monotonic(), False
    while before is not None:
        why = holder.why_gone(me) if holder is not None else None
        if why is not None:
            return why
        waited = time.monotonic() - began
        if waited >= seconds:
            return f"which gave no sign of life for {seconds:.0f} s"
        if waited > 2 * BEAT_SECONDS and not announced:
            announced = True
            tell(announcement)
        time.sleep(_LOOK_SECONDS)
        if _state(path) != before:
            break
    return None


def _state(path: Path) -> tuple[int, bytes] | None:
    """Time and content of a file, None if it is gone; opened, as NFS then asks the server."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns, file.read()
    except FileNotFoundError:
        return None


def _numbers(place: Path) -> set[int]:
    """Of all owners' files; none where the folder is gone."""
    try:
        names = [path.name for path in place.iterdir()]
    except FileNotFoundError:
        return set()
    return {int(match[1]) for name in names if (match := _NAME.fullmatch(name))}


def _path(place: Path, number: int) -> Path:
    return place / f"{number}.json"


def _create(path: Path, me: Holder) -> bool:
    """Write an owner's file if there is none; of several processes one succeeds."""
    try:
        with path.open("x") as file:
            file.write(me.model_dump_json() + "\n")
    except FileExistsError:
        return False
    return True


def _write(path: Path, me: Holder, released: bool) -> None:
    """Change an owner's file where it lies; one that is gone does not come back."""
    with path.open("r+") as file:
        file.write(me.model_copy(update={"released": released}).model_dump_json() + "\n")
        file.truncate()


def _read(path: Path) -> Holder | None:
    """Who has the folder; None for a file that is gone, half written or damaged."""
    try:
        return read_json_as(path, Holder)
    except (OSError, UserError):
        return None


def _this_process() -> Holder:
    job, cluster = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_CLUSTER_NAME")
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    me, (boot, _, processes) = Process.at(os.getpid()), machine().partition(" ")
    assert me is not None, "this process runs"
    return Holder(
        host=socket.gethostname(),
        boot=boot,
        processes=processes,
        pid=me.pid,
        started=me.started,
        job=job and (f"{job} of {cluster}" if cluster else job),
        restart=int(count) if count.isdecimal() else 0,
        since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    )


def _clock() -> float:
    """Seconds that also pass while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
