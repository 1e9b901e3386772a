"""Saves on the nodes themselves, between those of the run folder (docs/surviving.md)."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from coca_scale.engine.checkpoint import PROGRESS, step_name
from coca_scale.engine.node_saves import (
    complete_here,
    drop_below,
    make_own,
    name_on_nodes,
    rescue,
)
from coca_scale.engine.ownership import Owner
from coca_scale.engine.partners import Partners
from coca_scale.engine.train_engine import TrainEngine
from coca_scale.engine.watchdog import NoWatchdog, Watchdog
from coca_scale.engine.world import World
from coca_scale.engine.writing import Entries
from coca_scale.engine.zero_files import STATE_TAG
from coca_scale.errors import AgreedError, UserError
from coca_scale.recipe import Recipe
from coca_scale.recipe.run_folder import CHECKPOINTS
from coca_scale.training.events import append_event
from coca_scale.training.log import RunLog
from coca_scale.training.pending import Pending, of_all_ranks

TELL_EVERY = 100


class _Cost(NamedTuple):
    """Of a save."""

    step: int
    bytes: int
    seconds: float
    blocked_seconds: float


def rescue_local(recipe: Recipe, world: World, notes: list[str]) -> Path | None:
    """Where this node's local saves are; first a newer one than any checkpoint becomes one.

    A collective.

    Args:
        recipe: of the run.
        world: the ranks.
        notes: gets what was done.

    Returns:
        None without local saves.

    Raises:
        AgreedError: a folder cannot be written.
    """
    section = recipe.checkpoint
    if section.local_every_steps is None:
        return None
    checkpoints = recipe.run.folder / CHECKPOINTS
    place = Path(section.local_dir or os.environ.get("TMPDIR") or "/tmp")
    folder = place / world.on_first(lambda: name_on_nodes(checkpoints))
    if section.resume == "auto":
        note = rescue(folder, checkpoints, world)
        notes += [] if note is None else [note]
    return folder


class LocalSaves:
    """Saves on the nodes, one at a time; none where the recipe has none. All are collectives.

    One that fails is a warning: the run goes on, and the one before stays. Two are on a node at
    most, the newest that is complete everywhere and the one under way.
    """

    def __init__(
        self,
        engine: TrainEngine,
        folder: Path | None,
        recipe: Recipe,
        progress: Callable[[], dict[str, Any]],
        log: RunLog,
        owner: Owner,
        watchdog: Watchdog | NoWatchdog,
        timeout_seconds: float,
    ) -> None:
        """Save into `folder` of every node, from `begin` to `end`.

        Args:
            engine: what is saved.
            folder: on this node, of the run; None without local saves.
            recipe: of the run.
            progress: JSON data of the training loop; its "step" names the save.
            log: is told what the first save has cost, and then every some.
            owner: of the run folder; a job that lost it completes nothing.
            watchdog: limits the time of every save.
            timeout_seconds: the limit.
        """
        self._engine, self._world = engine, engine.world
        self._run, self._every = recipe.run.folder, recipe.checkpoint.local_every_steps
        self._folder = folder
        self._partners: Partners | None = None
        self._progress = progress
        self._log = log
        self._owner = owner
        self._watchdog = watchdog
        self._timeout = timeout_seconds
        self._token = ""
        self._pending: Pending | None = None
        self._useful_from = 0  # earlier ones have a newer one or a checkpoint
        self._pool = ThreadPoolExecutor(1, "old local saves")
        self._dropping: Future[None] | None = None
        self._costs: list[_Cost] = []
        self._told = 0
        self._failing = False

    def begin(self, node_bytes: int) -> None:
        """Join the partners, clear away what an earlier start has left, see that there is room.

        Args:
            node_bytes: of a save, of the ranks of this node.

        Raises:
            AgreedError: naming a node where the folder cannot be had.
        """
        if self._folder is None:
            return
        with self._watchdog.phase("preparing saves on the nodes", self._timeout):
            self._partners = Partners(self._world, self._timeout)
            self._world.agree(self._clear)
            self._token = self._world.on_first(lambda: secrets.token_hex(4))
            self._world.agree(partial(self._make_room, node_bytes))
        if not self._partners.there:
            self._log.say("local saves have no second node: they outlive a rank, not the node")

    @property
    def written_here(self) -> bool:
        """Whether this rank has nothing more to do for the save under way. Local."""
        return self._pending is not None and self._pending.files.done()

    def due(self, step: int) -> bool:
        """Whether the recipe saves after this step. Local."""
        return self._every is not None and step % self._every == 0

    def save(self) -> None:
        """Save now; disk and partner are not waited for, but a save that is still under way is."""
        self.finish()
        with self._watchdog.phase("saving on the nodes", self._timeout):
            self._begin(time.perf_counter())

    def finish(self) -> None:
        """Wait for the save under way, if there is one."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        with self._watchdog.phase("saving on the nodes", self._timeout):
            started = time.perf_counter()
            size, failure = self._complete(pending)
        now = time.perf_counter()
        if failure is not None:
            self._fail(pending.step, failure)
            return
        self._failing = False
        self._drop_before(pending.step)
        blocked = pending.blocked_seconds + now - started
        self._costs.append(_Cost(pending.step, size, now - pending.started, blocked))
        if self._told == 0 or len(self._costs) == TELL_EVERY:
            self._tell()

    def superseded(self, step: int) -> None:
        """There is a checkpoint of `step`: saves up to that are of no more use."""
        self._drop_before(step + 1)

    def end(self, remove: bool) -> None:
        """The last method that is called; with `remove` no save stays on the nodes."""
        self.finish()
        if self._partners is None:
            return
        if self._costs:
            self._tell()
        self._partners.close()
        self._pool.shutdown()
        if remove:
            self._world.agree(self._clear)

    @property
    def _first_here(self) -> bool:
        """Whether this rank does what is done once per node."""
        world = self._world
        return world.hosts.index(world.hosts[world.rank]) == world.rank

    def _begin(self, started: float) -> None:
        """Copy everything; writing and sending go on by themselves."""
        assert self._folder is not None and self._partners is not None, "there are none"
        if self._dropping is not None:
            wait([self._dropping])  # there is room for two
        progress = self._progress()
        final = self._folder / self._world.hosts[self._world.rank] / step_name(progress["step"])
        temporary = final.with_name(f"{final.name}.{self._token}")
        state = temporary / STATE_TAG  # DeepSpeed makes it otherwise, and one rank alone would fail
        try:
            self._world.agree(lambda: state.mkdir(parents=True, exist_ok=True))
        except AgreedError as error:
            self._discard(temporary)
            self._fail(progress["step"], str(error))
            return
        if self._world.rank == 0:
            self._engine.add_file(temporary / PROGRESS, json.dumps(progress).encode())
        files = self._partners.exchange(temporary, self._engine.save_state(temporary))
        blocked = time.perf_counter() - started
        self._pending = Pending(final, temporary, files, started, blocked)

    def _complete(self, pending: Pending) -> tuple[int, str | None]:
        """Give the pending save its name on every node: bytes of its files, or why not."""
        try:
            self._world.on_first(self._owner.require)
            files = of_all_ranks(pending.written(self._world), self._world)
            self._world.agree(lambda: self._into_place(pending, files))
        except AgreedError as error:
            self._discard(pending.temporary, pending.final)
            return 0, str(error)
        return sum(entry["bytes"] for entry in files.values()), None

    def _discard(self, *folders: Path) -> None:
        for folder in folders if self._first_here else ():
            shutil.rmtree(folder, ignore_errors=True)

    def _into_place(self, pending: Pending, files: Entries) -> None:
        if self._first_here:
            hosts = list(dict.fromkeys(self._world.hosts))
            complete_here(pending.temporary, pending.final, files, hosts)

    def _drop_before(self, step: int) -> None:
        self._useful_from = max(step, self._useful_from)
        if self._folder is not None and self._first_here:
            here = self._folder / self._world.hosts[self._world.rank]
            self._dropping = self._pool.submit(drop_below, here, self._useful_from)

    def _clear(self) -> None:
        """Remove all: what was saved under another name of this node, too."""
        assert self._folder is not None
        if self._first_here:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _make_room(self, node_bytes: int) -> None:
        assert self._folder is not None and self._partners is not None
        place, host = self._folder.parent, self._world.hosts[self._world.rank]
        if not place.is_dir():
            raise UserError(f"{host}: checkpoint.local_dir {place} is not a folder there")
        make_own(self._folder)
        needed = 2 * node_bytes * (2 if self._partners.there else 1)
        free = shutil.disk_usage(place).free
        if free < needed:
            raise UserError(
                f"{host}: {place} has {free / 1e9:.2f} GB free, and two local saves take "
                f"{needed / 1e9:.2f} GB there; make room, set another checkpoint.local_dir, or "
                "leave out checkpoint.local_every_steps"
            )

    def _fail(self, step: int, failure: str) -> None:
        """Say it once, until one is complete again: they come often."""
        if not self._failing:
            self._log.say(f"warning: {step_name(step)} could not be saved on the nodes: {failure}")
            self._tell_event(step, failure=failure)
        self._failing = True

    def _tell(self) -> None:
        """What the saves since the last one that was told have cost, each of them."""
        costs, self._costs = self._costs, []
        before = f" and {len(costs) - 1} before" if len(costs) > 1 else ""
        self._told += len(costs)
        step = costs[-1].step
        sums = (sum(values) for values in zip(*costs, strict=True))
        _, size, seconds, blocked = (total / len(costs) for total in sums)
        self._log.say(
            f"saved {step_name(step)}{before} on the nodes: {size / 1e6:.1f} MB in "
            f"{seconds:.1f} s, of which training waited {blocked:.2f} s"
        )
        cost = {"seconds": round(seconds, 3), "blocked_seconds": round(blocked, 3)}
        self._tell_event(step, saves=len(costs), bytes=round(size), **cost)

    def _tell_event(self, step: int, **values: Any) -> None:
        if self._owner.holds():
            append_event(self._run, "save", kind="local", step=step, **values)
