"""A model from whatever a user names: a run, a checkpoint, or an OpenCLIP folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from coca_scale.data.tokens import Tokenizer, make_tokenizer
from coca_scale.engine.checkpoint import (
    MANIFEST,
    find_checkpoint,
    read_progress,
    read_weights,
    verify_checkpoint,
)
from coca_scale.model import ModelConfig
from coca_scale.model.config import parse_model_config
from coca_scale.openclip.folder import CONFIG_FILE, Model, build_model, read_folder


@dataclass(frozen=True)
class LoadedModel:
    """Weights under our names, the model made of them, and its tokenizer."""

    weights: dict[str, Tensor]
    config: ModelConfig
    model: Model
    tokenizer: Tokenizer


def load_model(name: str) -> LoadedModel:
    """Load a run folder, a checkpoint folder, or an OpenCLIP model folder, in fp32 on the CPU.

    Raises:
        ValueError: not one of these, damaged, or not a CoCa.
    """
    folder = Path(name)
    if not folder.is_dir():
        raise ValueError(f"{name}: no such folder; give a run, a checkpoint or an exported model")
    if (folder / CONFIG_FILE).is_file():
        config, weights = read_folder(folder)
    else:
        checkpoint = folder if (folder / MANIFEST).is_file() else None
        checkpoint = checkpoint or find_checkpoint(folder / "checkpoints")
        if checkpoint is None:
            raise ValueError(
                f"{name}: neither a run with a complete checkpoint, nor a checkpoint, "
                f"nor a model folder with {CONFIG_FILE}"
            )
        verify_checkpoint(checkpoint)
        config = parse_model_config(read_progress(checkpoint)["model_cfg"], str(checkpoint))
        weights = read_weights(checkpoint)
    model = build_model(config, weights)
    return LoadedModel(weights, config, model, make_tokenizer(config, folder))
