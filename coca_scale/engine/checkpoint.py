"""Checkpoint folders that are complete or absent.

A checkpoint is written under a temporary name while training goes on; once every rank's files are
on the disk a manifest with their sizes and SHA-256 is added, the folder is renamed, and only then
does `latest` name it.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from coca_scale.engine.train_engine import CONSTANTS_FILE, SCALE_FILE, TrainEngine
from coca_scale.engine.weight_average import AVERAGE_FOLDER
from coca_scale.engine.world import World
from coca_scale.engine.writing import Entries, sync_folder, write_hashed
from coca_scale.engine.zero import (
    STATE_TAG,
    Layout,
    full_weights,
    replica_weights,
    to_universal,
)
from coca_scale.errors import AgreedError, UserError
from coca_scale.model.weights import LOGIT_SCALE
from coca_scale.recipe.files import read_json, sha256_of

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
LATEST = "latest"
_NAME = re.compile(r"step_(\d{8})")
_TEMPORARY = ".incomplete"  # swept away
_REPLACED = ".replaced"  # put back, or swept away once its successor is in place
_DAMAGED = ".damaged"  # kept for a person to look at


@dataclass(frozen=True)
class SaveReport:
    """How a save went.

    Attributes:
        path: the checkpoint.
        error: why there is none, None if it is complete.
        blocked_seconds: that training stood still for it.
        seconds: from its beginning to its end.
        bytes: on disk.
    """

    path: Path
    error: str | None
    blocked_seconds: float
    seconds: float
    bytes: int

    def __str__(self) -> str:
        if self.error is not None:
            return f"{self.path.name} could not be saved: {self.error}"
        return (
            f"saved {self.path.name}: {self.bytes / 1e6:.1f} MB in {self.seconds:.1f} s, of which "
            f"training waited {self.blocked_seconds:.1f} s"
        )


@dataclass
class _Pending:
    final: Path
    temporary: Path
    files: Future[Entries]
    started: float
    blocked_seconds: float


class CheckpointWriter:
    """Saves of one run, one at a time. `begin` and `finish` are collectives."""

    def __init__(
        self, engine: TrainEngine, parent: Path, keep: int | None, keep_every: int | None
    ) -> None:
        """Write into `parent`; keep the newest `keep`, and those of every `keep_every` steps."""
        self._engine = engine
        self._parent = parent
        self._keep = keep
        self._keep_every = keep_every
        self._pending: _Pending | None = None

    @property
    def pending(self) -> bool:
        """Whether a save has begun that has not been finished."""
        return self._pending is not None

    @property
    def written_here(self) -> bool:
        """Whether this rank's files of the pending save are on the disk, or failed to get there."""
        return self._pending is not None and self._pending.files.done()

    def begin(self, progress: dict[str, Any]) -> SaveReport | None:
        """Copy everything; writing goes on by itself.

        Args:
            progress: JSON data of the training loop; `progress["step"]` names the checkpoint.

        Returns:
            A report if it failed at once.
        """
        assert self._pending is None, "one save at a time"
        started = time.perf_counter()
        world = self._engine.world
        final = self._parent / f"step_{progress['step']:08d}"
        temporary = final.with_name(final.name + _TEMPORARY)
        try:
            world.on_first(lambda: _make_empty(temporary))
        except AgreedError as error:
            return SaveReport(final, str(error), 0.0, time.perf_counter() - started, 0)
        content = json.dumps(progress).encode()
        if world.rank == 0:
            self._engine.add_file(temporary / PROGRESS, content)
        files = self._engine.save_state(temporary)
        blocked = time.perf_counter() - started
        self._pending = _Pending(final, temporary, files, started, blocked)
        return None

    def finish(self) -> SaveReport:
        """Wait for the pending save, and make it a checkpoint if all of it is on the disk."""
        assert self._pending is not None
        started = time.perf_counter()
        pending, self._pending = self._pending, None
        world = self._engine.world
        files: Entries = {}
        failure = None
        try:
            mine = world.agree(lambda: _written(pending, world.rank))
            files = {name: entry for part in world.gather(mine) for name, entry in part.items()}
            world.on_first(lambda: self._complete(pending, files))
        except AgreedError as error:
            failure = str(error)
            if world.rank == 0:
                shutil.rmtree(pending.temporary, ignore_errors=True)
        blocked = pending.blocked_seconds + time.perf_counter() - started
        seconds = time.perf_counter() - pending.started
        size = sum(entry["bytes"] for entry in files.values())
        return SaveReport(pending.final, failure, blocked, seconds, size)

    def _complete(self, pending: _Pending, files: Entries) -> None:
        content = json.dumps({"files": dict(sorted(files.items()))}, indent=1).encode()
        write_hashed(pending.temporary / MANIFEST, lambda file: file.write(content))
        sync_folder(pending.temporary)
        replaced = pending.final.with_name(pending.final.name + _REPLACED)
        if pending.final.exists():  # left by a run that a resume went back behind
            pending.final.rename(replaced)
        pending.temporary.rename(pending.final)
        sync_folder(self._parent)
        _write_latest(self._parent, pending.final.name)
        shutil.rmtree(replaced, ignore_errors=True)
        self._drop_old()

    def _drop_old(self) -> None:
        complete = sorted(p for p in self._parent.iterdir() if _NAME.fullmatch(p.name))
        for folder in complete[: -self._keep] if self._keep is not None else []:
            if self._keep_every and int(folder.name[-8:]) % self._keep_every == 0:
                continue
            (folder / MANIFEST).unlink(missing_ok=True)  # first: it is no checkpoint any more
            shutil.rmtree(folder, ignore_errors=True)


def _written(pending: _Pending, rank: int) -> Entries:
    """This rank's files, once they are on the disk."""
    try:
        return pending.files.result()
    except OSError as error:
        raise UserError(f"rank {rank}: {error}") from error


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_latest(parent: Path, name: str) -> None:
    temporary = parent / f"{LATEST}.tmp"
    write_hashed(temporary, lambda file: file.write(f"{name}\n".encode()))
    temporary.replace(parent / LATEST)


def sweep(parent: Path) -> None:
    """Clear away what a killed run left half done; only where no run is writing."""
    if not parent.is_dir():
        return
    for replaced in parent.glob(f"*{_REPLACED}"):
        original = replaced.with_name(replaced.name.removesuffix(_REPLACED))
        if original.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(original)
    for leftover in parent.glob(f"*{_TEMPORARY}"):
        shutil.rmtree(leftover, ignore_errors=True)


def complete_checkpoints(parent: Path) -> list[Path]:
    """Folders with a manifest, the newest first; whether their files are whole is not looked at."""
    if not parent.is_dir():
        return []
    named = [p for p in parent.iterdir() if _NAME.fullmatch(p.name) and (p / MANIFEST).is_file()]
    return sorted(named, key=lambda p: p.name, reverse=True)


def find_checkpoint(parent: Path) -> Path | None:
    """The newest complete checkpoint, None without one."""
    return next(iter(complete_checkpoints(parent)), None)


def newest_intact(parent: Path, world: World, notes: list[str]) -> Path | None:
    """The newest checkpoint whose files are as they were saved; damaged ones are set aside.

    A collective: every rank checks its share of the files, where it sees them.

    Args:
        parent: folder of checkpoints.
        world: the ranks.
        notes: gets a warning for every damaged one.
    """
    for folder in world.on_first(lambda: complete_checkpoints(parent)):
        try:
            verify_together(folder, world)
        except AgreedError as fault:
            notes.append(f"warning: {fault}; going back to an older checkpoint")
            world.on_first(partial(_set_aside, folder))
        else:
            return folder
    return None


def _set_aside(folder: Path) -> None:
    target = folder.with_name(folder.name + _DAMAGED)
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)


def verify_together(folder: Path, world: World) -> None:
    """Let every rank look at its share of a checkpoint's files. A collective.

    Raises:
        AgreedError: not a complete checkpoint, or a file is missing or changed.
    """
    world.agree(lambda: verify_checkpoint(folder, world.rank, world.size))


def verify_checkpoint(folder: Path, share: int = 0, shares: int = 1) -> None:
    """Compare every `shares`-th file, from number `share` on, with the manifest.

    Raises:
        UserError: not a complete checkpoint, or a file is missing or changed.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: not a complete checkpoint (no {MANIFEST})") from error
    for name, entry in list(files.items())[share::shares]:
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise UserError(f"{folder}: {name} is missing or has another size than when saved")
        if sha256_of(path) != entry["sha256"]:
            raise UserError(f"{folder}: {name} is damaged (its checksum differs)")


@contextlib.contextmanager
def fitting_state(
    checkpoint: Path, layout: Layout, scratch: Path, world: World
) -> Iterator[Path | None]:
    """The state of a checkpoint in DeepSpeed's universal format, where its layout is not `layout`.

    A collective. The copy lies in folder `scratch` and is removed at the end of the block.

    Raises:
        UserError: it cannot be converted; on every rank.
    """
    saved = saved_layout(checkpoint)
    if saved == layout or (saved.zero_stage == layout.zero_stage == 0):  # plain replicas fit all
        yield None
        return
    if 0 in (saved.zero_stage, layout.zero_stage):
        raise UserError(
            f"{checkpoint} was written by {saved}; ZeRO stage 0 and the others cannot be "
            "converted into each other. Set engine.zero_stage as it was"
        )
    target = scratch / f"{checkpoint.name}.universal{_TEMPORARY}"
    universal = target / STATE_TAG  # the converter leaves a file beside its folder

    def convert() -> None:
        shutil.rmtree(target, ignore_errors=True)
        to_universal(checkpoint / STATE_TAG, universal)

    world.on_first(convert)
    yield universal
    world.barrier()
    if world.rank == 0:
        shutil.rmtree(target, ignore_errors=True)


def saved_layout(folder: Path) -> Layout:
    """How the state in a checkpoint is cut."""
    state = torch.load(folder / SCALE_FILE, map_location="cpu", weights_only=True)
    return Layout(state["ranks"], state["zero_stage"])


def read_progress(folder: Path) -> dict[str, Any]:
    """The training loop's own state."""
    progress: dict[str, Any] = read_json(folder / PROGRESS)
    return progress


def read_weights(folder: Path, raw: bool = False) -> dict[str, Tensor]:
    """All fp32 weights of a checkpoint, logit scale included, without any process group or GPU.

    Of a run that averages its weights this is the average, or with `raw` the last weights.
    """
    state = torch.load(folder / SCALE_FILE, map_location="cpu", weights_only=True)
    averaged = (folder / AVERAGE_FOLDER).is_dir() and not raw
    if state["zero_stage"] == 0:
        weights = replica_weights(folder)
    else:
        weights = full_weights(folder / AVERAGE_FOLDER if averaged else folder)
    return {**weights, **read_constants(folder), LOGIT_SCALE: state["model"]["log_scale"]}


def read_constants(folder: Path) -> dict[str, Tensor]:
    """Weights and buffers that training did not change, as they were when it began."""
    file = folder / CONSTANTS_FILE
    return load_file(file) if file.is_file() else {}
