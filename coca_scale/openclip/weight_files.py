"""Weight files as people have them: safetensors, .bin, .pt, training checkpoints."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from coca_scale.errors import UserError

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def read_weight_file(path: Path) -> dict[str, Tensor]:
    """Tensors of a file under OpenCLIP's names, memory-mapped where the format allows.

    Training checkpoints of OpenCLIP (`state_dict` inside, `module.` or `_orig_mod.` before every
    name) are unwrapped. Pickles are read with `weights_only=True`: no code in them runs.

    Raises:
        UserError: no such file, truncated, or holding something else than weights.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size < 200:
        raise UserError(f"{path}: not a weight file; a Git LFS pointer? fetch it with git lfs pull")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: holds a {type(content).__name__}, not named weights")
    weights = {}
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor")
        weights[name.removeprefix("module.").removeprefix("_orig_mod.")] = value
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or cut short ({error}); fetch it again") from error


def _read_pickle(path: Path) -> Any:
    mappable = zipfile.is_zipfile(path)  # the format before torch 1.6 is not
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds more than weights, and loading it could run code in it; save its "
            "state_dict as .safetensors where you trust it"
        ) from error
    except Exception as error:  # reading rubbish, an unpickler raises anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        if "TorchScript" in reason:
            raise UserError(f"{path}: a TorchScript program, not a file of weights") from error
        raise UserError(f"{path}: damaged or cut short ({reason}); fetch it again") from error
