"""Who writes into a run folder or an output: one job at a time, on shared file systems too.

A folder of lock files goes with it: N.json says who has it, and the highest N counts. A number is
created with O_EXCL, so of jobs that start at the same moment one gets it, and none comes back: who
wakes up after another job took over finds a higher one, or an output's lock gone. The owner touches
its file every few seconds; others see that the time of the file changes, and compare it with no
clock.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from coca_scale.errors import UserError, refusal
from coca_scale.recipe.files import NoFileError, open_regular, parse_json, validated
from coca_scale.recipe.process import Process, machine
from coca_scale.recipe.run_folder import LOCK
from coca_scale.recipe.text import tell, visible

BEAT_SECONDS = 5.0
WATCH_SECONDS = 60.0  # without a beat, after which an owner elsewhere counts as gone
_LOOK_SECONDS = 0.5
_AGAIN_SECONDS = 0.05
_MOST_BYTES = 2**16
_OUT_ADVICE = "wait until it has ended, or choose another --out"
_NAME = re.compile(r"([1-9][0-9]*)\.json")
_Short = Annotated[str, Field(max_length=200)]


@dataclass(frozen=True)
class Claim:
    """What a process wants for itself.

    Attributes:
        target: a run folder, or a file or folder that is written.
        place: folder of the lock files.
        advice: what who comes second can do.
        lasting: the folder of lock files stays when its owner ends.
    """

    target: Path
    place: Path
    advice: str
    lasting: bool = False


def run_claim(folder: Path) -> Claim:
    """A run folder, to train into."""
    advice = f"end that run (touch {folder}/STOP), or set another run.dir"
    return Claim(folder, folder / LOCK, advice, lasting=True)


def file_claim(out: Path) -> Claim:
    """A file that a verb writes."""
    return Claim(out, out.with_name(f".{out.name}.lock"), _OUT_ADVICE)


def folder_claim(out: Path) -> Claim:
    """A folder that a verb fills; what is beside it need not be writable."""
    return Claim(out, out / ".lock", _OUT_ADVICE)


class Holder(BaseModel):
    """The process that has what it claimed, as its file says.

    Attributes:
        host: name of its machine.
        boot: which start of which kernel it runs on.
        processes: name space in which `pid` is meant.
        pid: of rank 0.
        started: of this process, in clock ticks after the machine's start.
        job: of SLURM, with its cluster; None elsewhere.
        restart: how often SLURM has started the job again.
        launch: how often its ranks have been started again since, in the same allocation.
        since: when it took it, by its own clock; for people.
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
    launch: int = 0
    since: _Short
    released: bool = False

    def __str__(self) -> str:
        start = f"{self.restart}.{self.launch}" if self.launch else f"{self.restart}"
        job = "" if self.job is None else f", SLURM job {self.job} start {start}"
        return visible(f"process {self.pid} on {self.host}{job}, since {self.since}")

    def why_gone(self, me: Holder) -> str | None:
        """What tells process `me` at once that this one writes no more; None if nothing does."""
        earlier = (self.restart, self.launch) < (me.restart, me.launch)
        if self.job is not None and self.job == me.job and earlier:
            return "an earlier start of this job"
        here = (self.host, self.boot, self.processes) == (me.host, me.boot, me.processes)
        if here and self.boot and Process(self.pid, self.started).gone:
            return "which is dead"
        return None


def start_of_job() -> tuple[int, int]:
    """How often SLURM has started this job again, and slurm/launch.sh its ranks since then."""

    def count(variable: str) -> int:
        text = os.environ.get(variable, "")
        return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else 0

    return count("SLURM_RESTART_COUNT"), count("COCA_SCALE_LAUNCH")


class Lock:
    """What this process has for itself, and the thread that shows that it lives."""

    def __init__(self, claim: Claim, number: int, me: Holder) -> None:
        """Use `take` or `held`."""
        self._claim = claim
        self._number = number
        self._me = me
        self._busy = threading.Lock()
        self._ended = threading.Event()
        self._looked = _clock()
        self.lost: str | None = None
        self._thread = threading.Thread(target=self._live, name="owner", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, claim: Claim, watch_seconds: float = WATCH_SECONDS) -> Lock:
        """Get it for this process, from an owner that is gone as well.

        Args:
            claim: what to get; the folder of its lock files is made if it is not there.
            watch_seconds: how long an owner is watched of which nothing else is known.

        Raises:
            UserError: another process has it, or it cannot be written.
        """
        place, me = claim.place, _this_process()
        try:
            while True:
                place.mkdir(parents=True, exist_ok=True)
                last = max(_numbers(place), default=0)
                before, mine = _path(place, last), _path(place, last + 1)
                found = _gone(claim, before, me, watch_seconds) if last else (None, None)
                if found is None or not _create(mine, me):
                    time.sleep(_AGAIN_SECONDS)
                    continue  # an owner has ended, or somebody else was faster
                seen, note = found
                newest = max(_numbers(place), default=0)  # a list of names may have been old
                if newest == last + 1 and (seen is None or _look(before) in (seen, None)):
                    break
                mine.unlink(missing_ok=True)
            for number in _numbers(place) - {last + 1}:
                _path(place, number).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{claim.target} cannot be written: {refusal(error)}") from error
        if note is not None:
            tell(note)
        return cls(claim, last + 1, me)

    def holds(self) -> bool:
        """Whether no other process has taken it meanwhile. Looks at most twice a second."""
        if self.lost is None and _clock() - self._looked > _LOOK_SECONDS:
            self._beat()  # however short a suspension was, a job may have begun in it
        return self.lost is None

    def require(self) -> None:
        """See that it has not been taken over.

        Raises:
            UserError: it has been, and by whom.
        """
        if not self.holds():
            raise UserError(str(self.lost))

    def release(self) -> None:
        """Leave it to whoever wants it."""
        self._ended.set()
        self._thread.join(BEAT_SECONDS)
        self._beat()
        if self.lost is None:
            path = _path(self._claim.place, self._number)
            with suppress(OSError):  # then others find out that this process has ended
                if self._claim.lasting:
                    _write(path, self._me, released=True)
                else:
                    path.unlink()
                    path.parent.rmdir()  # unless somebody is waiting in it

    def _live(self) -> None:
        while not self._ended.wait(BEAT_SECONDS) and self.lost is None:
            self._beat()

    def _beat(self) -> None:
        """Look whether it is still this process's, and show that it lives."""
        place = self._claim.place
        path = _path(place, self._number)
        with self._busy, suppress(OSError):  # a disk that is away for a while says nothing
            numbers = _numbers(place)
            if not numbers and self._claim.lasting:  # removed, and taken over or not
                place.mkdir(parents=True, exist_ok=True)
                _create(path, self._me)
            elif not numbers or max(numbers) != self._number or _read(path) not in (self._me, None):
                new = _read(_path(place, max(numbers))) if numbers else None
                self.lost = (
                    f"{self._claim.target} was taken over by {new or 'another process'} while this "
                    "one did not answer; it ends, and writes nothing more"
                )
            else:
                os.utime(path)
            self._looked = _clock()


@contextmanager
def held(claim: Claim) -> Iterator[Lock]:
    """The target for this process alone, while the block runs.

    Raises:
        UserError: another process has it, or it cannot be written.
    """
    lock = Lock.take(claim)
    try:
        yield lock
    finally:
        lock.release()


@dataclass(frozen=True)
class Seen:
    """A lock file at a moment.

    Attributes:
        changed: time of the file.
        content: what is in it.
    """

    changed: int
    content: bytes

    @property
    def holder(self) -> Holder | None:
        """Who wrote it; None if it is half written or damaged."""
        try:
            return validated(parse_json(self.content, "lock"), Holder, "lock")
        except UserError:
            return None

    @property
    def released(self) -> bool:
        """Whether who wrote it has ended in order."""
        return self.holder is not None and self.holder.released

    @property
    def dead(self) -> bool:
        """Whether this process can tell that who wrote it runs no more."""
        return self.holder is not None and self.holder.why_gone(_this_process()) is not None


def last_seen(claim: Claim) -> Seen | None:
    """The file of the last owner, for who wants nothing but to know; None if there was none.

    Raises:
        UserError: something else is in its place.
        OSError: it cannot be read.
    """
    number = max(_numbers(claim.place), default=None)
    return None if number is None else _look(_path(claim.place, number))


def _gone(claim: Claim, path: Path, me: Holder, seconds: float) -> tuple[Seen, str | None] | None:
    """Wait until it is sure that the owner that wrote `path` is gone.

    Returns:
        What was seen of it, and what is to be said about it; None if the file has become another.

    Raises:
        UserError: the owner is not gone, or the file is none.
    """
    seen = _look(path)
    if seen is None:
        return None
    if seen.released:
        return seen, None
    name = seen.holder or "a process that did not write who it is"
    announcement = f"watching for {seconds:.0f} s whether {name} still uses {claim.target}"
    why = _why_gone(path, seen, me, seconds, announcement)
    if why is not None:
        return seen, f"taking over {claim.target} from {name}, {why}"
    now = _look(path)
    if now is None or now.released:
        return None
    raise UserError(f"{claim.target} is in use by {now.holder or name}: {claim.advice}")


def _why_gone(path: Path, seen: Seen, me: Holder, seconds: float, announcement: str) -> str | None:
    """Why the owner that wrote `path` counts as gone; None once the file changes or is removed.

    Says the announcement if that takes longer than a beat.
    """
    holder, began, announced = seen.holder, time.monotonic(), False
    while True:
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
        if _look(path) != seen:
            return None


def _look(path: Path) -> Seen | None:
    """What a lock file says, None if it is gone; opened, as NFS then asks the server.

    Raises:
        UserError: it is something else than a file.
    """
    try:
        with open_regular(path) as file:
            return Seen(os.fstat(file.fileno()).st_mtime_ns, file.read(_MOST_BYTES))
    except FileNotFoundError as error:
        if path.is_symlink():  # it would stay, and be looked at for ever
            raise NoFileError(f"{path} is a link to nothing; move it away") from error
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
        file = path.open("x")
    except (FileExistsError, FileNotFoundError):  # the folder went with the lock of another
        return False
    try:
        with file:
            file.write(me.model_dump_json() + "\n")
    except OSError:
        path.unlink(missing_ok=True)  # others would watch it, for who does not say who it is
        raise
    return True


def _write(path: Path, me: Holder, released: bool) -> None:
    """Change an owner's file where it lies; one that is gone does not come back."""
    with path.open("r+") as file:
        file.write(me.model_copy(update={"released": released}).model_dump_json() + "\n")
        file.truncate()


def _read(path: Path) -> Holder | None:
    """Who has the target; None for a file that is gone, half written or damaged, or is none."""
    try:
        seen = _look(path)
    except (OSError, UserError):
        return None
    return None if seen is None else seen.holder


def _this_process() -> Holder:
    job, cluster = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_CLUSTER_NAME")
    restart, launch = start_of_job()
    me, (boot, _, processes) = Process.at(os.getpid()), machine().partition(" ")
    assert me is not None, "this process runs"
    return Holder(
        host=socket.gethostname(),
        boot=boot,
        processes=processes,
        pid=me.pid,
        started=me.started,
        job=job and (f"{job} of {cluster}" if cluster else job)[:200],
        restart=restart,
        launch=launch,
        since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    )


def _clock() -> float:
    """Seconds that also pass while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
