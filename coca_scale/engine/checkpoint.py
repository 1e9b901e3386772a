"""Checkpoint folders that are complete or absent.

A checkpoint is written under a temporary name while training goes on; once every rank's files are
on the disk a manifest with their sizes and SHA-256 is added, the folder is renamed, and only then
does `latest` name it.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, FiniteFloat, InstanceOf, field_validator
from torch import Tensor

from coca_scale.engine.constants import read_constants
from coca_scale.engine.train_engine import SCALE_FILE
from coca_scale.engine.weight_average import AVERAGE_FOLDER
from coca_scale.engine.world import World
from coca_scale.engine.writing import Entries, sync_folder, write_hashed
from coca_scale.engine.zero_files import (
    STATE_TAG,
    Layout,
    full_weights,
    replica_weights,
    to_universal,
)
from coca_scale.errors import AgreedError, UserError
from coca_scale.model.config import ModelConfig, parse_model_config
from coca_scale.model.pickles import read_pickle
from coca_scale.recipe.files import read_json_as, sha256_of, validated

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
LATEST = "latest"
_Count = Annotated[int, Field(ge=0, lt=2**63)]
STEP_NAME = re.compile(r"step_(\d{8})")
_TEMPORARY = ".incomplete"  # swept away
_REPLACED = ".replaced"  # put back, or swept away once its successor is in place
_DAMAGED = ".damaged"  # kept for a person to look at


class _Entry(BaseModel):
    bytes: _Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """What was saved."""

    files: dict[str, _Entry]

    @field_validator("files")
    @classmethod
    def _of_this_folder(cls, files: dict[str, _Entry]) -> dict[str, _Entry]:
        for name in files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"{name!r} lies outside the checkpoint")
        if missing := {PROGRESS, SCALE_FILE} - files.keys():
            raise ValueError(f"it does not list {', '.join(sorted(missing))}")
        return files


class _BadSteps(BaseModel):
    skipped: _Count
    spikes: _Count
    spread: tuple[_Count, FiniteFloat, Annotated[FiniteFloat, Field(ge=0)]]


class _Skips(BaseModel):
    bad: _Count
    filtered: _Count
    causes: dict[str, _Count]
    listed: _Count


class _Identity(BaseModel):
    recipe: dict[str, Any]
    ranks: _Count
    tokenizer: str
    data: str
    samples: str | None
    teacher: str | None = None


class _Progress(BaseModel):
    """State of the training loop; what has a default came later than the rest."""

    step: Annotated[int, Field(ge=0, lt=10**8)]
    samples_seen: _Count
    bad_steps: _BadSteps
    skips: _Skips
    stage: Annotated[int, Field(ge=1, lt=10**6)] = 1
    lanes: Annotated[list[list[_Count]], Field(min_length=1)]
    left: dict[Annotated[str, Field(pattern="^[1-9][0-9]{0,5}$")], list[list[_Count]]] = {}
    model_cfg: dict[str, Any]
    identity: _Identity | None = None


def begin_folder(final: Path) -> Path:
    """An empty folder to write the checkpoint `final` into, which no other job writes into.

    Raises:
        OSError: of the disk.
    """
    temporary = final.with_name(f"{final.name}.{secrets.token_hex(4)}{_TEMPORARY}")
    temporary.mkdir(parents=True)
    return temporary


def complete_folder(temporary: Path, final: Path, files: Entries) -> None:
    """Make a checkpoint of a folder that has all its files, and let `latest` name it.

    Raises:
        OSError: of the disk; whatever was there before is there still.
    """
    content = json.dumps({"files": dict(sorted(files.items()))}, indent=1).encode()
    write_hashed(temporary / MANIFEST, lambda file: file.write(content))
    sync_folder(temporary)
    replaced = final.with_name(final.name + _REPLACED)
    if final.exists():  # left by a run that a resume went back behind
        final.rename(replaced)
    temporary.rename(final)
    sync_folder(final.parent)
    _write_latest(final.parent, final.name)
    shutil.rmtree(replaced, ignore_errors=True)


def drop_old(parent: Path, keep: int | None, keep_every: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and those of every `keep_every` steps."""
    complete = sorted(p for p in parent.iterdir() if STEP_NAME.fullmatch(p.name))
    for folder in complete[:-keep] if keep is not None else []:
        if keep_every and int(folder.name[-8:]) % keep_every == 0:
            continue
        (folder / MANIFEST).unlink(missing_ok=True)  # first: it is no checkpoint any more
        shutil.rmtree(folder, ignore_errors=True)


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
    named = [
        p for p in parent.iterdir() if STEP_NAME.fullmatch(p.name) and (p / MANIFEST).is_file()
    ]
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
        UserError: not a complete checkpoint, a file is missing or changed, or what the training
            loop keeps there is not what it keeps.
    """
    for name, entry in list(_manifest(folder).files.items())[share::shares]:
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry.bytes:
            raise UserError(f"{folder}: {name} is missing or has another size than when saved")
        if sha256_of(path) != entry.sha256:
            raise UserError(f"{folder}: {name} is damaged (its checksum differs)")
    read_progress(folder)


def _manifest(folder: Path) -> Manifest:
    try:
        return read_json_as(folder / MANIFEST, Manifest)
    except OSError as error:
        raise UserError(f"{folder}: not a complete checkpoint (no {MANIFEST})") from error


@contextlib.contextmanager
def fitting_state(
    checkpoint: Path, layout: Layout, scratch: Path, world: World, remade: bool = False
) -> Iterator[Path | None]:
    """The state of a checkpoint in DeepSpeed's universal format, where its layout is not `layout`.

    Or where the run's model is `remade`: has other sizes, or trains other weights. A collective.
    The copy lies in folder `scratch` and is removed at the end of the block.

    Raises:
        UserError: it cannot be converted; on every rank.
    """
    saved = saved_layout(checkpoint)
    replicas = saved.zero_stage == layout.zero_stage == 0  # which fit any number of ranks
    if replicas or (saved == layout and not remade):
        yield None
        return
    if 0 in (saved.zero_stage, layout.zero_stage):
        raise UserError(
            f"{checkpoint} was written by {saved}; ZeRO stage 0 and the others cannot be "
            "converted into each other. Set engine.zero_stage as it was"
        )
    target = scratch / f"{checkpoint.name}.universal{_TEMPORARY}"
    universal = target / STATE_TAG  # the converter leaves a file beside its folder
    try:
        world.on_first(lambda: _convert(checkpoint, saved, universal))
        yield universal
        world.barrier()
    finally:
        if world.rank == 0:
            shutil.rmtree(target, ignore_errors=True)


def _convert(checkpoint: Path, saved: Layout, universal: Path) -> None:
    """Write the state of a checkpoint in the universal format, where there is room for it."""
    shutil.rmtree(universal.parent, ignore_errors=True)
    universal.parent.mkdir(parents=True)
    files = _manifest(checkpoint).files.items()
    size = sum(entry.bytes for name, entry in files if name.startswith(f"{STATE_TAG}/"))
    needed = 2 * size  # its pieces and, for a while, what they are put together to
    message = (
        f"to change the layout of {checkpoint} takes {needed / 1e9:.2f} GB for a while, and "
        f"{universal.parents[1]} has {{:.2f}} GB free; make room, or start on {saved}, as it was "
        "saved"
    )
    free = shutil.disk_usage(universal.parent).free
    if free < needed:
        raise UserError(message.format(free / 1e9))
    try:
        to_universal(checkpoint / STATE_TAG, universal)
    except UserError as error:
        free = shutil.disk_usage(universal.parent).free
        if free < size:  # something else took it meanwhile
            raise UserError(message.format(free / 1e9)) from error
        raise


def saved_layout(folder: Path) -> Layout:
    """How the state in a checkpoint is cut.

    Raises:
        UserError: it does not say so.
    """
    state = _read_scale(folder)
    return Layout(state.ranks, state.zero_stage)


def read_progress(folder: Path) -> dict[str, Any]:
    """The training loop's own state.

    Raises:
        UserError: it is something else.
    """
    return read_json_as(folder / PROGRESS, _Progress).model_dump(exclude_unset=True)


def read_config(folder: Path) -> ModelConfig:
    """The model of a checkpoint; one that says nothing of pixels was trained with OpenAI's.

    Raises:
        UserError: not a model of this package.
    """
    return parse_model_config(read_progress(folder).get("model_cfg"), str(folder))


def read_weights(folder: Path, raw: bool = False) -> dict[str, Tensor]:
    """All fp32 weights of a checkpoint, logit scale included, without any process group or GPU.

    Of a run that averages its weights this is the average, or with `raw` the last weights.

    Raises:
        UserError: a file is missing, damaged, or holds something else.
    """
    state = _read_scale(folder)
    averaged = (folder / AVERAGE_FOLDER).is_dir() and not raw
    if state.zero_stage == 0:
        weights = replica_weights(folder)
    else:
        weights = full_weights(folder / AVERAGE_FOLDER if averaged else folder)
    scale = {f"logit_scale.{name}": tensor for name, tensor in state.model.items()}
    return {**weights, **read_constants(folder), **scale}


@dataclass(frozen=True)
class _Scale:
    """What is needed of a checkpoint's `SCALE_FILE`."""

    ranks: Annotated[int, Field(ge=1)]
    zero_stage: Literal[0, 1, 2, 3]
    model: Annotated[dict[Literal["log_scale", "bias"], InstanceOf[Tensor]], Field(min_length=1)]


def _read_scale(folder: Path) -> _Scale:
    file = folder / SCALE_FILE
    return validated(read_pickle(file), _Scale, str(file))
