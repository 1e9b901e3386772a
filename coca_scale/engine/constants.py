"""What training does not change: frozen parameters and buffers, as they were when it began."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from coca_scale.errors import UserError
from coca_scale.model import CoCa
from coca_scale.model.deferred import FirstWeights, whole_of

CONSTANTS_FILE = "constants.safetensors"
HOST = torch.device("cpu")


def constants_of(model: CoCa, first: FirstWeights | None) -> dict[str, Tensor]:
    """Of a model before DeepSpeed has it, whose own copies are rounded to the run's precision.

    Args:
        model: whose tensors have their values, or no memory.
        first: asked for those without.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        name: tensor.detach().contiguous()
        if tensor.device.type != "meta"
        else whole_of(name, tensor, first, tensor.dtype, HOST)
        for name, tensor in model.state_dict().items()
        if name not in trained
    }


def read_constants(folder: Path) -> dict[str, Tensor]:
    """Of a checkpoint.

    Raises:
        UserError: damaged.
    """
    file = folder / CONSTANTS_FILE
    try:
        return load_file(file) if file.is_file() else {}
    except SafetensorError as error:
        raise UserError(f"{file}: damaged or cut short ({error})") from error
