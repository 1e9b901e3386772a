"""Checkpoint folders that are complete or absent.

A checkpoint is written under a temporary name while training goes on; once every rank's files are
on the disk a manifest with their sizes and SHA-256 is added, the folder is renamed, and only then
does `latest` name it.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import BaseModel, Field, FiniteFloat, field_validator
from torch import Tensor

from coca_scale.engine.constants import read_constants
from coca_scale.engine.scale_file import SCALE_FILE, ScaleState, read_scale
from coca_scale.engine.weight_average import AVERAGE_FOLDER
from coca_scale.engine.world import World
from coca_scale.engine.writing import Entries, sync_folder, write_hashed
from coca_scale.engine.zero_files import replica_weights
from coca_scale.engine.zero_slices import SavedState
from coca_scale.errors import AgreedError, UserError
from coca_scale.model.config import ModelConfig, parse_model_config
from coca_scale.recipe.files import parse_json, read_json_as, sha256_of, validated
from coca_scale.recipe.run_folder import LATEST

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_NAME = re.compile(r"step_(\d{8})")
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


def drop_old(
    parent: Path, keep: int | None, keep_every: int | None, spared: Collection[str] = ()
) -> None:
    """Remove all but the newest `keep` checkpoints and those of every `keep_every` steps.

    Those that are named in `spared` stay for now.
    """
    names = newest_first(path.name for path in parent.iterdir())
    for name in surplus(names, keep, keep_every):
        if name not in spared:
            # first: it is no checkpoint any more
            (parent / name / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(parent / name, ignore_errors=True)


def surplus(names: Collection[str], keep: int | None, keep_every: int | None) -> list[str]:
    """Of checkpoints those that are neither among the newest `keep` nor of such a step.

    The oldest first: who is killed while removing them leaves the newer ones.
    """
    old = sorted(names, reverse=True)[keep:] if keep is not None else []
    return [name for name in reversed(old) if not (keep_every and step_of(name) % keep_every == 0)]


def newest_first(names: Iterable[str]) -> list[str]:
    """Those of `names` that are of checkpoints, in order."""
    return sorted(filter(_NAME.fullmatch, names), reverse=True)


def step_name(step: int) -> str:
    """The name of a checkpoint."""
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """The step of a checkpoint's name."""
    return int(name.removeprefix("step_"))


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
    named = (parent / name for name in newest_first(path.name for path in parent.iterdir()))
    return [folder for folder in named if (folder / MANIFEST).is_file()]


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


def listed_files(manifest: bytes, origin: str) -> Entries:
    """The files of a checkpoint that lies elsewhere, as its manifest has them.

    Raises:
        UserError: it is no manifest.
    """
    return validated(parse_json(manifest, origin), Manifest, origin).model_dump()["files"]


def _manifest(folder: Path) -> Manifest:
    try:
        return read_json_as(folder / MANIFEST, Manifest)
    except OSError as error:
        raise UserError(f"{folder}: not a complete checkpoint (no {MANIFEST})") from error


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
    state = read_scale(folder)
    averaged = (folder / AVERAGE_FOLDER).is_dir() and not raw
    weights = _trained(state, folder / AVERAGE_FOLDER if averaged else folder, None)
    scale = {f"logit_scale.{name}": tensor for name, tensor in state.model.items()}
    return {**weights, **read_constants(folder), **scale}


def read_trained(folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Some of the fp32 weights that a checkpoint trained; no other is read.

    Raises:
        UserError: as `read_weights`, or one is not there.
    """
    return _trained(read_scale(folder), folder, names) if names else {}


def _trained(state: ScaleState, folder: Path, names: Sequence[str] | None) -> dict[str, Tensor]:
    """Those of the names, or all of them."""
    if state.zero_stage == 0:
        weights = replica_weights(folder)
        return weights if names is None else {name: weights[name] for name in names}
    saved = SavedState(folder)
    return {name: saved.whole(name) for name in (saved.shapes if names is None else names)}
