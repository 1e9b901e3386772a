"""What training does not change: frozen parameters and buffers, as they were when it began."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from coca_scale.errors import UserError
from coca_scale.model import CoCa

CONSTANTS_FILE = "constants.safetensors"


def constants_of(model: CoCa) -> dict[str, Tensor]:
    """Of a model before DeepSpeed has it, whose own copies are rounded to the run's precision."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        name: tensor.detach().contiguous()
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
