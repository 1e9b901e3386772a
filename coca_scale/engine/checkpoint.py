"""Checkpoint folders that are complete or absent.

A checkpoint is written under a temporary name; a manifest with the size and SHA-256 of every file
is added last, the folder is renamed, and only then does `latest` name it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from coca_scale.engine.core import CONSTANTS_FILE, SCALE_FILE, STATE_TAG, TrainEngine
from coca_scale.engine.launch import World
from coca_scale.engine.weight_average import AVERAGE_FOLDER
from coca_scale.model.weights import LOGIT_SCALE
from coca_scale.recipe.files import sha256_of

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
LATEST = "latest"
_NAME = re.compile(r"step_(\d{8})")
_TEMPORARY = ".incomplete"


def save_checkpoint(
    engine: TrainEngine, parent: Path, progress: dict[str, Any], keep: int | None
) -> Path:
    """Save a complete checkpoint, then drop all but the newest `keep`. A collective.

    Args:
        engine: what to save.
        parent: folder of checkpoints.
        progress: JSON data of the training loop; `progress["step"]` names the checkpoint.
        keep: checkpoints kept, None for all.
    """
    world = engine.world
    final = parent / f"step_{progress['step']:08d}"
    temporary = final.with_name(final.name + _TEMPORARY)
    if world.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    world.barrier()
    engine.save_state(temporary)
    if world.rank == 0:
        (temporary / PROGRESS).write_text(json.dumps(progress))
    world.barrier()
    _write_manifest(temporary, world)
    if world.rank == 0:
        shutil.rmtree(final, ignore_errors=True)  # left by a run that a resume went back behind
        temporary.rename(final)
        _write_latest(parent, final.name)
        _drop_old(parent, keep)
    world.barrier()
    return final


def find_checkpoint(parent: Path) -> Path | None:
    """The newest complete checkpoint, None without one."""
    if not parent.is_dir():
        return None
    complete = [p for p in parent.iterdir() if _NAME.fullmatch(p.name) and (p / MANIFEST).is_file()]
    return max(complete, key=lambda p: p.name, default=None)


def verify_checkpoint(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        ValueError: not a complete checkpoint, or a file is missing or changed.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(f"{folder}: not a complete checkpoint (no {MANIFEST})") from error
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise ValueError(f"{folder}: {name} is missing or has another size than when saved")
        if sha256_of(path) != entry["sha256"]:
            raise ValueError(f"{folder}: {name} is damaged (its checksum differs)")


def read_progress(folder: Path) -> dict[str, Any]:
    """The training loop's own state."""
    progress: dict[str, Any] = json.loads((folder / PROGRESS).read_text())
    return progress


def read_weights(folder: Path, raw: bool = False) -> dict[str, Tensor]:
    """All fp32 weights of a checkpoint, logit scale included, without any process group or GPU.

    Of a run that averages its weights this is the average, or with `raw` the last weights.
    """
    state = torch.load(folder / SCALE_FILE, map_location="cpu", weights_only=True)
    averaged = (folder / AVERAGE_FOLDER).is_dir() and not raw
    if state["zero_stage"] == 0:
        file = folder / STATE_TAG / "mp_rank_00_model_states.pt"
        # DeepSpeed's own pickle of our own run; checkpoints are not an exchange format
        weights = torch.load(file, map_location="cpu", weights_only=False)["module"]
    else:
        silence = io.StringIO()  # DeepSpeed prints its progress
        source = folder / AVERAGE_FOLDER if averaged else folder
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            weights = get_fp32_state_dict_from_zero_checkpoint(str(source), tag=STATE_TAG)
    return {**weights, **read_constants(folder), LOGIT_SCALE: state["model"]["log_scale"]}


def read_constants(folder: Path) -> dict[str, Tensor]:
    """Weights and buffers that training did not change, as they were when it began."""
    file = folder / CONSTANTS_FILE
    return load_file(file) if file.is_file() else {}


def _write_manifest(folder: Path, world: World) -> None:
    """Every rank hashes its share of the files; rank 0 writes the list."""
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    mine = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for name in names[world.rank :: world.size]
    }
    files: dict[str, Any] = {}
    for part in world.gather(mine):
        assert isinstance(part, dict)
        files |= part
    if world.rank == 0:
        content = json.dumps({"files": dict(sorted(files.items()))}, indent=1)
        with (folder / MANIFEST).open("w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _write_latest(parent: Path, name: str) -> None:
    temporary = parent / f"{LATEST}.tmp"
    temporary.write_text(name + "\n")
    temporary.replace(parent / LATEST)


def _drop_old(parent: Path, keep: int | None) -> None:
    complete = sorted(p for p in parent.iterdir() if _NAME.fullmatch(p.name))
    for folder in complete[:-keep] if keep is not None else []:
        (folder / MANIFEST).unlink(missing_ok=True)  # first of all: it is no checkpoint any more
        shutil.rmtree(folder)
    for leftover in parent.glob(f"*{_TEMPORARY}"):
        shutil.rmtree(leftover, ignore_errors=True)
