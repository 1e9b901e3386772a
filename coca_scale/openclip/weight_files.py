"""Weight files as people have them: safetensors, .bin, .pt, training checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from coca_scale.errors import UserError
from coca_scale.model.pickles import read_pickle
from coca_scale.openclip.state_dict import from_openclip

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# of what trainers keep beside weights: learning rates, random states, arguments, paths, times
_BESIDE_WEIGHTS = ("argparse", "datetime", "numpy", "pathlib")


def read_openclip(path: Path) -> dict[str, Tensor]:
    """Weights of an OpenCLIP model under our names; errors as of `read_weight_file`.

    Raises:
        UserError: also if they belong to no model of this package.
    """
    return from_openclip(read_weight_file(path))


def read_weight_file(path: Path) -> dict[str, Tensor]:
    """Tensors of a file under OpenCLIP's names, in fp32, memory-mapped where they are so already.

    Training checkpoints of OpenCLIP (`state_dict` inside, `module.` or `_orig_mod.` before every
    name) are unwrapped, and what they hold beside weights is not read. No code in pickles runs.

    Raises:
        UserError: no such file, truncated, or holding something else than weights.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size < 200:
        raise UserError(f"{path}: not a weight file; a Git LFS pointer? fetch it with git lfs pull")
    if path.suffix == ".safetensors":
        content: Any = _read_safetensors(path)
    else:
        content = read_pickle(path, unread=_BESIDE_WEIGHTS, mapped=True)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: holds a {type(content).__name__}, not named weights")
    weights = {}
    for name, value in content.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: {name!r} is a {type(value).__name__}, not a tensor")
        if value.is_floating_point():
            if value.element_size() == 1:
                raise UserError(
                    f"{path}: {name!r} is {value.dtype}; give weights of 16 bits or more"
                )
            value = value.float()
        weights[name.removeprefix("module.").removeprefix("_orig_mod.")] = value
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or cut short ({error}); fetch it again") from error
