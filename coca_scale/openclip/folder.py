"""OpenCLIP model folders: writing, reading, and proving that they mean the same there."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from coca_scale.errors import UserError
from coca_scale.model import ModelConfig, load_model_config
from coca_scale.model.timm_tower import takes_image_size
from coca_scale.model.weights import Model, require_finite
from coca_scale.openclip.state_dict import to_openclip
from coca_scale.openclip.weight_files import read_openclip, read_weight_file
from coca_scale.recipe.whole_files import whole_file, whole_path

CONFIG_FILE = "open_clip_config.json"
SAFETENSORS_FILE = "open_clip_model.safetensors"
BIN_FILE = "open_clip_pytorch_model.bin"
OWN_CONFIG_FILE = "coca_scale_config.json"
OWN_WEIGHTS_FILE = "coca_scale_model.safetensors"
WITH_COCA2 = "4.2"  # of OpenCLIP: CoCa2, MaMMUT, modern text towers
_OPENCLIP_FILES = (CONFIG_FILE, SAFETENSORS_FILE, BIN_FILE)
_OWN_FILES = (OWN_CONFIG_FILE, OWN_WEIGHTS_FILE)


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


def openclip_obstacle(config: ModelConfig) -> str | None:
    """Why no OpenCLIP can compute what this model computes; None if one can."""
    vision, text = config.vision_cfg, config.text
    two_poolers = isinstance(vision.attentional_pool, str)
    if config.multimodal_cfg is not None:
        if vision.timm_model_name is not None and not two_poolers:
            return "OpenCLIP's CoCa cannot use a timm image tower with one pooler"
        if vision.timm_model_name is not None and not takes_image_size(vision.timm_model_name):
            return "OpenCLIP's CoCa cannot use a timm image tower of feature maps"
        if text.hf_model_name is not None:
            return "OpenCLIP's Hugging Face text tower is not causal: captions leak"
    elif vision.timm_model_name is not None and takes_image_size(vision.timm_model_name):
        import timm  # takes seconds

        built = timm.get_pretrained_cfg(vision.timm_model_name).input_size[-1]
        if vision.image_size != built:
            return f"OpenCLIP builds {vision.timm_model_name} for {built} px only"
    if text.hf_config is not None and text.vocab_size != text.hf_config["vocab_size"]:
        return f"OpenCLIP builds {text.hf_model_name} with its own vocabulary only"
    return None


def needs_openclip(config: ModelConfig) -> str:
    """The first version of OpenCLIP that reads an export of this model."""
    new = config.text_cfg is None or config.text.correct_cls_mask or config.text.modern
    return WITH_COCA2 if new or isinstance(config.vision_cfg.attentional_pool, str) else "3.0"


def what_reads(config: ModelConfig) -> str | None:
    """A sentence on the version that an export needs, if the installed one is older."""
    needed, installed = needs_openclip(config), version("open_clip_torch")
    if _numbers(installed) >= _numbers(needed):
        return None
    return f"open_clip {needed} and later read it, {installed} is installed here"


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def to_openclip_config(config: ModelConfig) -> dict[str, Any]:
    """The JSON object that OpenCLIP reads as `model_cfg`."""
    raw = _model_cfg(config)
    if config.text_cfg is not None:
        raw["text_cfg"].pop("hf_config", None)
        if not config.text_cfg.correct_cls_mask:
            raw["text_cfg"].pop("correct_cls_mask", None)
    if config.multimodal_cfg is not None:
        raw["vision_cfg"]["output_tokens"] = True
        if config.text_cfg is not None:
            raw["custom_text"] = raw["text_cfg"]["output_tokens"] = True
    return raw


def write_folder(
    weights: Mapping[str, Tensor],
    config: ModelConfig,
    folder: Path,
    write_more: Callable[[Path], None] | None = None,
) -> str | None:
    """Write a model folder: OpenCLIP's, or where that would mean something else there, our own.

    OpenCLIP's holds config, safetensors and a plain-tensor .bin; our own, config and safetensors
    under names that OpenCLIP does not look for. Without its config, which comes last, it is none.

    Args:
        weights: by our names.
        config: of the model.
        folder: is made if it is not there.
        write_more: puts what else belongs to the model into the folder.

    Returns:
        The reason for a folder of our own, None for one of OpenCLIP's.

    Raises:
        UserError: a weight is not finite.
    """
    require_finite(weights)
    preprocess = config.preprocess_cfg.model_dump(mode="json")
    obstacle = openclip_obstacle(config)
    if obstacle is None:
        theirs = to_openclip(weights, flat_text=_is_flat(config))
        theirs = {name: _saved(tensor) for name, tensor in theirs.items()}
        content = {"model_cfg": to_openclip_config(config), "preprocess_cfg": preprocess}
        _write_files(folder, _OPENCLIP_FILES, theirs, content, write_more)
    else:
        ours = {name: _saved(tensor) for name, tensor in weights.items()}
        own = {"model_cfg": _model_cfg(config), "preprocess_cfg": preprocess, "why": obstacle}
        _write_files(folder, _OWN_FILES, ours, own, write_more)
    return obstacle


def _write_files(
    folder: Path,
    names: tuple[str, ...],
    tensors: dict[str, Tensor],
    content: dict[str, Any],
    write_more: Callable[[Path], None] | None,
) -> None:
    """Write the files of a folder beside those of an earlier export, which then give way.

    Raises:
        OSError: of the disk; an earlier export is still there if weights and config had no room.
    """
    config, safetensors, *pickled = names
    with ExitStack() as files:  # the last one opened has its name first
        file = files.enter_context(whole_file(folder / config))
        file.write(f"{json.dumps(content, indent=2)}\n".encode())
        for name in pickled:
            torch.save(tensors, files.enter_context(whole_file(folder / name)))
        _save_safetensors(tensors, files.enter_context(whole_path(folder / safetensors)))
        for name in (CONFIG_FILE, OWN_CONFIG_FILE):
            (folder / name).unlink(missing_ok=True)  # what says that the folder is complete
        if write_more is not None:
            write_more(folder)
    for name in {*_OPENCLIP_FILES, *_OWN_FILES}.difference(names):
        (folder / name).unlink(missing_ok=True)


def _save_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    """
    Raises:
        OSError: of the disk, which safetensors tells in words.
    """
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        refused = re.search(r"\(os error (\d+)\)", str(error))
        if refused is None:
            raise
        number = int(refused[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def is_model_folder(folder: Path) -> bool:
    """Whether `read_folder` is for this folder."""
    return (folder / CONFIG_FILE).is_file() or (folder / OWN_CONFIG_FILE).is_file()


def read_folder(folder: Path) -> tuple[ModelConfig, Callable[[], dict[str, Tensor]]]:
    """Config of an OpenCLIP folder or one of our own, and what reads its weights, by our names.

    Raises:
        UserError: files missing or damaged, or a model that is not supported; of the weights when
            they are read.
    """
    if (folder / OWN_CONFIG_FILE).is_file():
        config = load_model_config(str(folder / OWN_CONFIG_FILE))
        return config, partial(read_weight_file, folder / OWN_WEIGHTS_FILE)
    config = load_model_config(str(folder / CONFIG_FILE))
    for name in (SAFETENSORS_FILE, BIN_FILE):
        if (folder / name).is_file():
            return config, partial(read_openclip, folder / name)
    raise UserError(f"{folder}: neither {SAFETENSORS_FILE} nor {BIN_FILE} in it")


@torch.no_grad()
def verify_folder(folder: Path, model: Model, batch: int = 4, seed: int = 0) -> Differences:
    """Load the folder with open_clip itself and compare outputs on random inputs.

    The captions have uneven lengths; logits are compared where a token is real.

    Raises:
        UserError: open_clip cannot load this model.
    """
    obstacle = openclip_obstacle(model.config) or what_reads(model.config)
    if obstacle is not None:
        raise UserError(f"{folder} cannot be verified with open_clip: {obstacle}")
    import open_clip  # heavy: only here is the whole of open_clip needed

    logging.getLogger().setLevel(logging.WARNING)
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    config = model.config
    text = config.text
    generator = torch.Generator().manual_seed(seed)
    size, length = config.vision_cfg.image_size, config.context_length
    images = torch.randn(batch, 3, size, size, generator=generator)
    tokens = torch.randint(3, text.vocab_size - 1, (batch, length), generator=generator)
    for row, words in enumerate(torch.linspace(3, length, batch).int().tolist()):
        tokens[row, words - 1] = text.eos_id if text.pool_type == "eos" else text.vocab_size - 1
        tokens[row, words:] = config.pad_id
    image = _largest(model.coca.encode_image(images), theirs.encode_image(images, normalize=True))
    words = _largest(model.coca.encode_text(tokens), theirs.encode_text(tokens, normalize=True))
    if model.coca.decoder is None:
        return Differences(image, words, caption_logits=0.0)
    _, image_tokens = model.coca.image(images)
    assert image_tokens is not None
    real = tokens[:, 1:] != config.pad_id
    ours = model.coca.caption_logits(image_tokens, tokens)[:, :-1]
    logits = theirs(images, tokens)["logits"][:, : real.shape[1]]  # of the last token in some
    return Differences(image, words, _largest(ours[real], logits[real]))


def _model_cfg(config: ModelConfig) -> dict[str, Any]:
    """Without what stands beside it in a file."""
    return {key: value for key, value in config.to_dict().items() if key != "preprocess_cfg"}


def _is_flat(config: ModelConfig) -> bool:
    """Whether OpenCLIP builds its CLIP class, whose text tower has no prefix."""
    text = config.text
    return not (config.custom_text or config.multimodal_cfg or text.hf_model_name or text.modern)


def _saved(tensor: Tensor) -> Tensor:
    """A copy of its own, weights in fp32."""
    return (tensor.float() if tensor.is_floating_point() else tensor).clone()


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
