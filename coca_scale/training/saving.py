"""When a run saves, and what it says about it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from coca_scale.engine.checkpoint import (
    PROGRESS,
    begin_folder,
    complete_folder,
    drop_old,
    step_name,
)
from coca_scale.engine.ownership import Owner
from coca_scale.engine.train_engine import TrainEngine
from coca_scale.engine.watchdog import NoWatchdog, Watchdog
from coca_scale.engine.writing import Entries
from coca_scale.errors import AgreedError
from coca_scale.recipe.checkpoint_section import CheckpointSection
from coca_scale.training.events import append_event
from coca_scale.training.local_saves import LocalSaves
from coca_scale.training.log import RunLog
from coca_scale.training.mirror import Mirror, NoMirror
from coca_scale.training.pending import Pending, of_all_ranks


class Saver:
    """Saves of a run, one at a time. All methods are collectives.

    A save that fails, as on a full disk, is a warning: the run goes on and older checkpoints stay.
    Only the one a run ends with must succeed.

    Attributes:
        local: saves on the nodes, in between; a checkpoint here supersedes those up to it.
    """

    def __init__(
        self,
        engine: TrainEngine,
        parent: Path,
        section: CheckpointSection,
        progress: Callable[[], dict[str, Any]],
        log: RunLog,
        owner: Owner,
        watchdog: Watchdog | NoWatchdog,
        timeout_seconds: float,
        mirror: Mirror | NoMirror,
        local: LocalSaves,
    ) -> None:
        """Save into `parent`.

        Args:
            engine: what is saved.
            parent: folder of checkpoints.
            section: when, and what to keep.
            progress: JSON data of the training loop; its "step" names the checkpoint.
            log: is told of every save.
            owner: of the run folder; a job that lost it saves nothing.
            watchdog: limits the time of every save.
            timeout_seconds: the limit.
            mirror: is offered every checkpoint.
            local: as above.
        """
        self._engine = engine
        self._parent = parent
        self._section = section
        self._progress = progress
        self._log = log
        self._owner = owner
        self._watchdog = watchdog
        self._timeout = timeout_seconds
        self._mirror = mirror
        self.local = local
        self._pending: Pending | None = None
        self._newest: int | None = None

    @property
    def written_here(self) -> bool:
        """Whether this rank has nothing more to do for the save under way. Local."""
        return self._pending is not None and self._pending.files.done()

    def due(self, step: int) -> bool:
        """Whether the recipe saves after this step. Local."""
        every = self._section.every_steps
        return every is not None and step % every == 0

    def save(self) -> str | None:
        """Save now; with `checkpoint.background` the disk is not waited for.

        Returns:
            Why that failed at once.

        Raises:
            AgreedError: another job has taken the run folder over.
        """
        self.finish()
        self._engine.world.on_first(self._owner.require)
        with self._watchdog.phase("saving", self._timeout):
            progress = self._progress()
            failure = self._begin(progress)
        self._newest = progress["step"] if failure is None else None
        if failure is not None:
            self._log.say(f"warning: {step_name(progress['step'])} could not be saved: {failure}")
            self._tell_event(progress["step"], failure=failure)
        elif not self._section.background:
            failure = self.finish()
        return failure

    def finish(self) -> str | None:
        """Wait for the save under way, if there is one; returns why it failed.

        Raises:
            AgreedError: another job has taken the run folder over; nothing more is written there.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        with self._watchdog.phase("saving", self._timeout):
            started = time.perf_counter()
            size, failure = self._complete(pending)
        now = time.perf_counter()
        seconds, blocked = now - pending.started, pending.blocked_seconds + now - started
        cost = {"seconds": round(seconds, 3), "blocked_seconds": round(blocked, 3)}
        if failure is not None:
            self._newest = None
            self._log.say(f"warning: {pending.final.name} could not be saved: {failure}")
            self._tell_event(pending.step, failure=failure, **cost)
        else:
            self._log.say(
                f"saved {pending.final.name}: {size / 1e6:.1f} MB in {seconds:.1f} s, of which "
                f"training waited {blocked:.1f} s"
            )
            self._tell_event(pending.step, bytes=size, **cost)
            self.local.superseded(pending.step)
        return failure

    def _tell_event(self, step: int, **values: Any) -> None:
        if self._owner.holds():
            append_event(self._parent.parent, "save", kind="shared", step=step, **values)

    def last(self, step: int) -> None:
        """Leave a checkpoint of `step`, unless there is one already.

        Raises:
            AgreedError: it cannot be saved.
        """
        if self.finish() is None and self._newest == step:
            return
        failure = self.save() or self.finish()
        if failure is not None:
            raise AgreedError(
                f"the last checkpoint cannot be saved: {failure}; once that is mended "
                "the same command goes on from the one before"
            )

    def _begin(self, progress: dict[str, Any]) -> str | None:
        """Copy everything; writing goes on by itself. Returns why that failed at once."""
        started = time.perf_counter()
        world = self._engine.world
        final = self._parent / step_name(progress["step"])
        try:
            temporary = world.on_first(partial(begin_folder, final))
        except AgreedError as error:
            return str(error)
        if world.rank == 0:
            self._engine.add_file(temporary / PROGRESS, json.dumps(progress).encode())
        files = self._engine.save_state(temporary)
        blocked = time.perf_counter() - started
        self._pending = Pending(final, temporary, files, started, blocked)
        return None

    def _complete(self, pending: Pending) -> tuple[int, str | None]:
        """Make the pending save a checkpoint if all of it is on the disk: its bytes, or why not."""
        world = self._engine.world
        world.on_first(self._owner.require)
        try:
            mine = pending.written(world)
            files = of_all_ranks(mine, world)
            world.on_first(lambda: self._into_place(pending, files))
        except AgreedError as error:
            world.on_first(self._owner.require)  # a run that was taken over ends: no failed save
            if world.rank == 0:
                shutil.rmtree(pending.temporary, ignore_errors=True)
            return 0, str(error)
        self._mirror.offer(pending.final, mine)
        return sum(entry["bytes"] for entry in files.values()), None

    def _into_place(self, pending: Pending, files: Entries) -> None:
        self._owner.require()  # writing may have taken long
        complete_folder(pending.temporary, pending.final, files)
        keep, keep_every = self._section.keep, self._section.keep_every_steps
        drop_old(self._parent, keep, keep_every, self._mirror.spared)
