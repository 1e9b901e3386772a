"""A copy of a run behind it: checkpoints, logs and export in a bucket, and the way back from there.

Every rank uploads the files that it wrote, in threads, while training goes on. When all have, which
they tell each other where they agree on the next step, rank 0 adds the manifest, again in a thread.
While a checkpoint is on its way newer ones wait, the newest of them only.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from coca_scale.data.bucket import Bucket
from coca_scale.data.sources import storage_options
from coca_scale.engine.checkpoint import (
    MANIFEST,
    begin_folder,
    complete_folder,
    drop_old,
    listed_files,
    read_progress,
    step_of,
)
from coca_scale.engine.ownership import Owner
from coca_scale.engine.watchdog import NoWatchdog, Watchdog
from coca_scale.engine.world import World
from coca_scale.engine.writing import Entries
from coca_scale.errors import AgreedError, UserError
from coca_scale.recipe import Recipe
from coca_scale.recipe.run_folder import CHECKPOINTS, EXPORT
from coca_scale.recipe.text import tell
from coca_scale.training.events import append_event
from coca_scale.training.mirrored import DamagedError, MirroredRun
from coca_scale.training.uploads import Hands, Upload, failure_of

GRACE_SECONDS = 60.0
THREADS = 4  # of a rank, that copy files


class Mirror:
    """What the ranks of a run do for its mirror.

    What goes wrong with it is a warning and the run goes on; only at its end all must be well.

    Attributes:
        names: of the checkpoints that were there at the start, the newest first.
        say: tells the person watching, on rank 0.
    """

    def __init__(
        self,
        url: str,
        recipe: Recipe,
        world: World,
        owner: Owner,
        watchdog: Watchdog | NoWatchdog,
    ) -> None:
        """See that it can be written to, and what is there. A collective.

        Args:
            url: where it is.
            recipe: of the run.
            world: the ranks.
            owner: of the run folder; a job that lost it copies nothing more.
            watchdog: limits what a run waits for, to `engine.save_timeout_minutes`.

        Raises:
            AgreedError: it cannot be written to.
        """
        self._run = MirroredRun(Bucket(url, storage_options(recipe.data)))
        self._folder, self._section = recipe.run.folder, recipe.checkpoint
        self._world, self._owner, self._watchdog = world, owner, watchdog
        self._seconds = recipe.engine.save_timeout_minutes * 60
        self._copying, self._sealing = Hands(THREADS, "mirror"), Hands(1, "mirror's manifests")
        self._current: Upload | None = None
        self._next: tuple[Path, Entries] | None = None
        self._seals: list[tuple[Upload, Future[tuple[int, str | None]]]] = []
        self._failure: str | None = None
        self.say: Callable[[str], None] = tell
        self.names: Collection[str] = world.on_first(self._look)
        self._begun, self._complete = {*self.names}, {*self.names}

    def _look(self) -> list[str]:
        try:
            self._run.check()
            return self._run.complete()
        except UserError as error:
            raise UserError(f"checkpoint.mirror: {error}") from error

    @property
    def spared(self) -> Collection[str]:
        """Names of checkpoints that are needed in the run folder; on rank 0 of all. Local."""
        needed = [upload.checkpoint for upload, _ in self._seals]
        needed += [self._current.checkpoint] if self._current is not None else []
        needed += [self._next[0]] if self._next is not None else []
        return {checkpoint.name for checkpoint in needed}

    def poll(self) -> bool:
        """Say what has arrived; whether this rank has copied all of what is on its way. Local."""
        while self._seals and self._seals[0][1].done():
            self._look_at_seal(deadline=0.0)
        return self._current is not None and self._current.done

    def offer(self, checkpoint: Path, mine: Entries) -> None:
        """Copy a complete checkpoint, once the one before has been. On all ranks; none waits.

        Args:
            checkpoint: its folder.
            mine: those of its files that this rank copies.
        """
        self._next = (checkpoint, mine)
        if self._current is None:
            self._begin()

    def _begin(self) -> None:
        assert self._next is not None
        checkpoint, mine = self._next
        self._next = None
        there = checkpoint.name in self._begun
        self._current = Upload(self._run, checkpoint, mine, there, self._copying)
        self._begun.add(checkpoint.name)
        self._complete.discard(checkpoint.name)

    def finish(self) -> None:
        """Make a checkpoint there of what all ranks have copied. A collective; nothing is waited
        for: what is not through by now has failed."""
        upload, self._current = self._current, None
        assert upload is not None
        failures = [f for f in self._world.gather(upload.failure()) if f is not None]
        if self._world.rank == 0:
            if failures:
                self._failed(upload, failures[0])
            else:
                self._seals.append((upload, self._sealing.do(partial(self._seal, upload))))
        if self._next is not None:
            self._begin()

    def _seal(self, upload: Upload) -> tuple[int, str | None]:
        """Bytes of a checkpoint that is one there now, and why old ones still are; in a thread."""
        self._owner.require()
        self._run.put_logs(self._folder)
        size = self._run.seal(upload.checkpoint)
        keep, keep_every = self._section.keep, self._section.keep_every_steps
        try:
            self._run.drop_old(keep, keep_every, self.spared)
        except UserError as error:
            return size, str(error)
        return size, None

    def _look_at_seal(self, deadline: float) -> None:
        upload, task = self._seals[0]
        failure = failure_of(task, deadline)
        del self._seals[0]
        if failure is not None:
            self._failed(upload, failure)
            return
        size, note = task.result()
        seconds, name = time.monotonic() - upload.begun, upload.checkpoint.name
        self._failure = None
        self._complete.add(name)
        self.say(f"mirrored {name}: {size / 1e6:.1f} MB in {seconds:.1f} s")
        if note is not None:
            self.say(f"warning: older checkpoints stay in the mirror: {note}")
        self._tell_event(upload, bytes=size, seconds=round(seconds, 3))

    def _failed(self, upload: Upload, failure: str) -> None:
        self._failure = failure
        self.say(f"warning: {upload.checkpoint.name} could not be mirrored: {failure}")
        self._tell_event(upload, failure=failure)

    def _tell_event(self, upload: Upload, **values: Any) -> None:
        if self._owner.holds():
            step = step_of(upload.checkpoint.name)
            append_event(self._folder, "save", kind="mirror", step=step, **values)

    def wait(self) -> str | None:
        """Wait for all that was offered, to a limit; returns why the newest is not there.

        A collective. A job that lost its run folder waits for nothing, and copies nothing more.
        """
        holds = self._world.on_first(self._owner.holds)
        deadline = time.monotonic() + (self._seconds if holds else 0.0)
        self._next = self._next if holds else None
        with self._phase():
            while self._current is not None:
                self._current.wait(deadline)
                self.finish()
            return self._world.on_first(partial(self._wait_for_seals, deadline))

    def _phase(self) -> AbstractContextManager[None]:
        """We keep to the limit ourselves, and then have a little longer to say so."""
        return self._watchdog.phase("mirroring", self._seconds + GRACE_SECONDS)

    def _wait_for_seals(self, deadline: float) -> str | None:
        """And drop what had been spared."""
        while self._seals:
            self._look_at_seal(deadline)
        checkpoints = self._folder / CHECKPOINTS
        if self._owner.holds() and checkpoints.is_dir():
            drop_old(checkpoints, self._section.keep, self._section.keep_every_steps)
        return self._failure

    def last(self, checkpoint: Path | None) -> None:
        """See that the last checkpoint of a run is there, if it has one. A collective.

        Raises:
            AgreedError: it is not.
        """
        failure = self.wait()
        if checkpoint is None:
            return
        if failure is None and self._world.on_first(lambda: checkpoint.name not in self._complete):
            self.offer(checkpoint, self._world.agree(partial(self._share_of, checkpoint)))
            failure = self.wait()
        if failure is not None:
            raise AgreedError(
                f"the last checkpoint cannot be mirrored: {failure}; once that is mended the same "
                "command does it"
            )

    def _share_of(self, checkpoint: Path) -> Entries:
        manifest = (checkpoint / MANIFEST).read_bytes()
        return self._share(listed_files(manifest, str(checkpoint)))

    def _share(self, files: Entries) -> Entries:
        """What this rank copies of files that all ranks see."""
        names = sorted(files, key=lambda name: (-int(files[name]["bytes"]), name))
        return {name: files[name] for name in names[self._world.rank :: self._world.size]}

    def put_export(self) -> None:
        """Copy the export of the run. A collective.

        Raises:
            AgreedError: it cannot be done.
        """
        with self._phase():
            self._world.on_first(lambda: self._run.put_export(self._folder / EXPORT))

    def put_logs(self) -> None:
        """Copy the logs as they are now. A collective.

        Raises:
            AgreedError: it cannot be done.
        """
        with self._phase():
            self._world.on_first(lambda: self._run.put_logs(self._folder))

    def close(self) -> None:
        """Nothing more is copied by this process. Local."""
        self._copying.close()
        self._sealing.close()

    def fetch(self, parent: Path, newest: Path | None, notes: list[str]) -> Path | None:
        """Bring the newest checkpoint that is there into the run folder, with its logs, if it is
        newer than `newest`. A collective; every rank copies its share.

        Args:
            parent: folder of checkpoints.
            newest: intact one of the run folder.
            notes: gets a line about it, and a warning for every one that is damaged.

        Returns:
            Its folder; None if none is newer.

        Raises:
            AgreedError: the mirror cannot be read, or the disk is full.
        """
        for name in self._world.on_first(self._run.complete):
            if newest is not None and name <= newest.name:
                return None
            started = time.monotonic()
            self._world.set_timeout(self._seconds + 2 * GRACE_SECONDS)
            with self._phase():
                size, damage = self._fetch(parent / name)
            if damage is None:
                self._world.on_first(lambda: self._run.get_logs(self._folder))
                seconds = time.monotonic() - started
                cost = f"{size / 1e6:.1f} MB in {seconds:.1f} s"
                notes.append(f"fetched {name} from {self._run.url}: {cost}")
                return parent / name
            notes.append(f"warning: {damage}; going back to an older checkpoint")
        return None

    def _fetch(self, final: Path) -> tuple[int, str | None]:
        """Make a checkpoint of the run folder of one there: its bytes, or how it is damaged."""
        world = self._world
        files, damage = world.on_first(lambda: self._files(final.name))
        if damage is not None:
            return 0, damage
        temporary = world.on_first(partial(begin_folder, final))
        try:
            mine = partial(self._get, final.name, self._share(files), temporary)
            damages = [d for d in world.gather(world.agree(mine)) if d is not None]
            if not damages:
                damage = world.on_first(partial(_into_place, temporary, final, files))
        finally:
            if world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
        size = sum(int(entry["bytes"]) for entry in files.values())
        return size, damages[0] if damages else damage

    def _files(self, name: str) -> tuple[Entries, str | None]:
        try:
            return self._run.files(name), None
        except DamagedError as fault:
            return {}, str(fault)

    def _get(self, name: str, mine: Entries, folder: Path) -> str | None:
        """Copy files into a folder; returns how one of them is damaged."""
        tasks = [
            self._copying.do(partial(self._run.get, name, file, entry, folder))
            for file, entry in mine.items()
        ]
        wait(tasks)  # none may write into the folder when it is removed
        try:
            for task in tasks:
                task.result()
        except DamagedError as fault:
            return str(fault)
        return None


def _into_place(temporary: Path, final: Path, files: Entries) -> str | None:
    """Make a checkpoint of fetched files; returns why they are none."""
    try:
        read_progress(temporary)
    except UserError as fault:
        return str(fault)
    complete_folder(temporary, final, files)
    return None


class NoMirror:
    """Of a run that has none; what a mirror does is said in `Mirror`."""

    names: Collection[str] = ()
    spared: Collection[str] = ()
    say: Callable[[str], None] = staticmethod(tell)

    def poll(self) -> bool:
        """Nothing is on its way."""
        return False

    def offer(self, *_: object) -> None:
        """Nothing is copied."""

    def finish(self) -> None:
        """Nothing was on its way."""

    def wait(self) -> str | None:
        """Nothing can fail."""
        return None

    def last(self, *_: object) -> None:
        """Nothing is copied."""

    def put_export(self) -> None:
        """Nothing is copied."""

    def put_logs(self) -> None:
        """Nothing is copied."""

    def close(self) -> None:
        """Nothing is copied."""

    def fetch(self, *_: object) -> Path | None:
        """Nothing is there."""
        return None


def mirror_of(
    recipe: Recipe, world: World, owner: Owner, watchdog: Watchdog | NoWatchdog
) -> Mirror | NoMirror:
    """The mirror of a run, if its recipe has one. A collective.

    Raises:
        AgreedError: it cannot be written to.
    """
    url = recipe.checkpoint.mirror
    return NoMirror() if url is None else Mirror(url, recipe, world, owner, watchdog)
