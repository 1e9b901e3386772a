"""A model from whatever a user names: a run, a checkpoint, an export, a file, a published model."""

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
from coca_scale.model import ModelConfig, load_model_config
from coca_scale.model.config import available_models, parse_model_config
from coca_scale.model.weights import Model, build_model
from coca_scale.openclip.files import WEIGHT_SUFFIXES, read_weight_file
from coca_scale.openclip.folder import is_model_folder, read_folder
from coca_scale.openclip.hub import HUB_PREFIX, hub_folder, registry_file
from coca_scale.openclip.names import from_openclip


@dataclass(frozen=True)
class Found:
    """Weights under our names, the config they were made for, and where a tokenizer may lie."""

    config: ModelConfig
    weights: dict[str, Tensor]
    folder: Path | None


@dataclass(frozen=True)
class LoadedModel:
    """Weights under our names, the model made of them, and its tokenizer."""

    weights: dict[str, Tensor]
    config: ModelConfig
    model: Model
    tokenizer: Tokenizer


def load_model(name: str, config: str | None = None, raw_weights: bool = False) -> LoadedModel:
    """Load a model in fp32 on the CPU, in evaluation mode.

    Args:
        name: a run folder, a checkpoint folder, an export, a weight file, `hf-hub:ORG/NAME`, or
            `NAME@TAG` of OpenCLIP's registry.
        config: for a weight file, the name or JSON file of its model config.
        raw_weights: of a run that averages its weights, take the last ones and not the average.

    Raises:
        ValueError: not one of these, damaged, not reachable, or not a model of this package.
    """
    found = find_model(name, config, raw_weights)
    model = build_model(found.config, found.weights)
    tokenizer = make_tokenizer(found.config, found.folder)
    return LoadedModel(found.weights, found.config, model, tokenizer)


def find_model(name: str, config: str | None = None, raw_weights: bool = False) -> Found:
    """Config and weights of a model; arguments and errors as of `load_model`."""
    path = Path(name)
    if path.is_dir():
        return _in_folder(path, raw_weights)
    if name.startswith(HUB_PREFIX):
        config_file, weight_file = hub_folder(name)
        return _in_file(weight_file, str(config_file))
    if path.is_file() or path.suffix in WEIGHT_SUFFIXES:
        if config is None:
            raise ValueError(
                f"{name}: a weight file does not say what model it is; give its config, one of "
                f"{', '.join(available_models())}, or a JSON file"
            )
        return _in_file(path, config)
    model, separator, tag = name.partition("@")
    if separator:
        load_model_config(model)  # its own message for an unknown model comes first
        return _in_file(registry_file(model, tag), model)
    raise ValueError(
        f"{name}: no such folder or file; a model is a run, a checkpoint, an exported folder, a "
        "weight file, hf-hub:ORG/NAME, or NAME@TAG"
    )


def _in_folder(folder: Path, raw_weights: bool) -> Found:
    if is_model_folder(folder):
        return Found(*read_folder(folder), folder)
    checkpoint = folder if (folder / MANIFEST).is_file() else None
    checkpoint = checkpoint or find_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise ValueError(
            f"{folder}: neither a run with a complete checkpoint, nor a checkpoint, nor a model "
            "folder with a config of OpenCLIP's"
        )
    verify_checkpoint(checkpoint)
    config = parse_model_config(read_progress(checkpoint)["model_cfg"], str(checkpoint))
    return Found(config, read_weights(checkpoint, raw_weights), checkpoint.parents[1])


def _in_file(file: Path, config: str) -> Found:
    weights = from_openclip(read_weight_file(file))
    return Found(load_model_config(config), weights, Path(config).parent)
