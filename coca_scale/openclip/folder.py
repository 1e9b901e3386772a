"""OpenCLIP model folders: writing, reading, and proving that they mean the same there."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coca_scale.model import CoCa, LogitScale, ModelConfig
from coca_scale.model.config import parse_model_config
from coca_scale.model.image import IMAGE_MEAN, IMAGE_STD
from coca_scale.openclip.names import OUR_LOGIT_SCALE, from_openclip, to_openclip

CONFIG_FILE = "open_clip_config.json"
SAFETENSORS_FILE = "open_clip_model.safetensors"
BIN_FILE = "open_clip_pytorch_model.bin"


@dataclass(frozen=True)
class Model:
    """A model ready for use, with its temperature."""

    coca: CoCa
    logit_scale: LogitScale

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.coca.config


@dataclass(frozen=True)
class Differences:
    """Largest absolute differences between our outputs and open_clip's."""

    image_features: float
    text_features: float
    caption_logits: float

    @property
    def largest(self) -> float:
        """The largest of all."""
        return max(self.image_features, self.text_features, self.caption_logits)


def build_model(config: ModelConfig, weights: Mapping[str, Tensor]) -> Model:
    """A model from fp32 weights under our names, logit scale included.

    Raises:
        ValueError: the weights are not those of this configuration.
    """
    with torch.device("meta"):
        coca = CoCa(config)
    towers = {name: tensor for name, tensor in weights.items() if name != OUR_LOGIT_SCALE}
    expected = coca.state_dict()
    missing, unexpected = sorted(expected.keys() - towers), sorted(towers.keys() - expected)
    if missing or unexpected:
        raise ValueError(
            f"weights do not fit the model: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}"
        )
    for name, tensor in towers.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, "
                f"the model config says {tuple(expected[name].shape)}"
            )
    coca.load_state_dict(towers, assign=True)
    logit_scale = LogitScale()
    logit_scale.log_scale.data.copy_(weights[OUR_LOGIT_SCALE])
    return Model(coca.eval().requires_grad_(False), logit_scale.requires_grad_(False))


def write_folder(weights: Mapping[str, Tensor], config: ModelConfig, folder: Path) -> None:
    """Write an OpenCLIP model folder (config, safetensors, plain-tensor .bin)."""
    folder.mkdir(parents=True, exist_ok=True)
    theirs = {name: tensor.float().clone() for name, tensor in to_openclip(weights).items()}
    broken = [name for name, tensor in theirs.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{len(broken)} weights are not finite, first: {broken[0]}")
    content = {
        "model_cfg": config.to_openclip(),
        "preprocess_cfg": {
            "mean": list(IMAGE_MEAN),
            "std": list(IMAGE_STD),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")
    save_file(theirs, folder / SAFETENSORS_FILE)
    torch.save(theirs, folder / BIN_FILE)


def read_folder(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and weights, under our names, of an OpenCLIP CoCa folder.

    Raises:
        ValueError: files missing or not those of a CoCa.
    """
    try:
        raw: Any = json.loads((folder / CONFIG_FILE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}: no readable {CONFIG_FILE} in it") from error
    config = parse_model_config(raw.get("model_cfg", raw), str(folder / CONFIG_FILE))
    if (folder / SAFETENSORS_FILE).is_file():
        theirs = load_file(folder / SAFETENSORS_FILE)
    elif (folder / BIN_FILE).is_file():
        theirs = torch.load(folder / BIN_FILE, map_location="cpu", weights_only=True)
    else:
        raise ValueError(f"{folder}: neither {SAFETENSORS_FILE} nor {BIN_FILE} in it")
    return config, from_openclip(theirs)


@torch.no_grad()
def verify_folder(folder: Path, model: Model, batch: int = 4, seed: int = 0) -> Differences:
    """Load the folder with open_clip itself and compare outputs on random inputs.

    The captions have uneven lengths; logits are compared where a token is real.
    """
    import open_clip  # heavy: only here is the whole of open_clip needed

    logging.getLogger().setLevel(logging.WARNING)
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    size, length = config.vision_cfg.image_size, config.context_length
    images = torch.randn(batch, 3, size, size, generator=generator)
    tokens = torch.randint(1, config.text_cfg.vocab_size, (batch, length), generator=generator)
    for row, words in enumerate(torch.linspace(3, length, batch).int().tolist()):
        tokens[row, words:] = config.pad_id
    reference = theirs(images, tokens)
    _, image_tokens = model.coca.image(images)
    real = tokens[:, 1:] != config.pad_id
    ours = model.coca.caption_logits(image_tokens, tokens)[:, :-1]
    return Differences(
        _largest(model.coca.encode_image(images), reference["image_features"]),
        _largest(model.coca.encode_text(tokens), reference["text_features"]),
        _largest(ours[real], reference["logits"][real]),
    )


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
