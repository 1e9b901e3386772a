"""A model from whatever a user names: a run, a checkpoint, an export, a file, a published model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from coca_scale.data.images import decode_image, eval_pixels
from coca_scale.data.sample import BadSample
from coca_scale.data.tokens import Tokenizer, make_tokenizer, prompt_ids
from coca_scale.errors import UserError
from coca_scale.inference.generate import generate
from coca_scale.inference.generation_options import GenerationOptions
from coca_scale.model import ModelConfig, load_model_config
from coca_scale.model.config import available_models, parse_model_config
from coca_scale.model.image import normalize_pixels
from coca_scale.model.weights import Model, build_model
from coca_scale.openclip.folder import (
    BIN_FILE,
    CONFIG_FILE,
    SAFETENSORS_FILE,
    is_model_folder,
    read_folder,
)
from coca_scale.openclip.hub import (
    HUB_PREFIX,
    hub_folder,
    registry_config,
    registry_facts,
    registry_file,
)
from coca_scale.openclip.weight_files import WEIGHT_SUFFIXES, read_openclip
from coca_scale.recipe.run_folder import CHECKPOINTS
from coca_scale.recipe.schema import ModelSection

_DIGESTED = 2**14  # numbers of a tensor, of which no training leaves all as they were


@dataclass(frozen=True)
class Found:
    """A model's config, what reads its weights, and where a tokenizer may lie."""

    config: ModelConfig
    read: Callable[[], dict[str, Tensor]]
    folder: Path | None

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Under our names; read when they are first asked for.

        Raises:
            UserError: their file is damaged, dangerous or of no model of this package.
        """
        return self.read()

    def digest(self) -> str:
        """As `model_digest`; reads the weights."""
        return model_digest(self.config, self.read())


@dataclass(frozen=True)
class LoadedModel:
    """A model to use: pictures and captions in, features and captions out.

    Methods with names of open_clip's mean the same there.

    Attributes:
        weights: under our names.
        config: in OpenCLIP's terms.
        model: what was made of them.
        tokenizer: captions → token ids [n, context_length].
    """

    weights: dict[str, Tensor]
    config: ModelConfig
    model: Model
    tokenizer: Tokenizer

    def preprocess(self, image: Image.Image) -> Tensor:
        """A picture as the image tower takes it: resized and normalised as `preprocess_cfg` says.

        Returns:
            [3, H, W] on the model's device, in its dtype.
        """
        config, upright = self.config, decode_image(image, "picture")
        pixels = eval_pixels(upright, config.vision_cfg.image_size, config.preprocess_cfg)
        return self.normalize(pixels[None])[0]

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 pixels [B, 3, H, W] of the model's size → images as the image tower takes them."""
        return normalize_pixels(pixels.to(self.device), self.dtype, self.config.preprocess_cfg)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.logit_scale.log_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return next(self.model.coca.parameters()).dtype

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LoadedModel:
        """Move the model, in place, and compute in another type; the logit scale stays fp32."""
        self.model.coca.to(device, dtype)
        self.model.logit_scale.to(device)
        return self

    @torch.no_grad()
    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """Preprocessed images [B, 3, H, W] → features [B, embed_dim]."""
        return self.model.coca.encode_image(images, normalize)

    @torch.no_grad()
    def encode_text(self, tokens: Tensor, normalize: bool = True) -> Tensor:
        """Token ids [B, T] → features [B, embed_dim]."""
        return self.model.coca.encode_text(tokens.to(self.device), normalize)

    def generate(self, images: Tensor, text: Tensor | None = None, **options: Any) -> Tensor:
        """Captions of images.

        Args:
            images: preprocessed images [B, 3, H, W].
            text: token ids [T] or [B, T] that captions begin with; by default the start token.
            options: of `GenerationOptions`, which has open_clip's names and defaults.

        Returns:
            Token ids [B·samples, T], padded to the longest caption.

        Raises:
            UserError: the model is a CLIP, or an option makes no sense.
        """
        prompts = None if text is None else text.expand(len(images), -1).tolist()
        chosen = GenerationOptions(**options)
        written = generate(self.model.coca, images, self.tokenizer, chosen, prompts=prompts)
        tokens = written.tokens_BNL.flatten(0, 1)
        used = (tokens != self.tokenizer.pad_id).any(0).nonzero()
        return tokens[:, : int(used.max()) + 1]

    def caption(
        self, pictures: Sequence[Image.Image | str | Path], prompt: str = "", **options: Any
    ) -> list[str]:
        """Captions of pictures or picture files, `samples` for each.

        Args:
            pictures: pictures or their files.
            prompt: words that every caption begins with.
            options: of `GenerationOptions`.

        Raises:
            UserError: the model is a CLIP, a file is not a picture, or an option makes no sense.
        """
        images = torch.stack([self.preprocess(_opened(picture)) for picture in pictures])
        text = torch.tensor(prompt_ids(self.tokenizer, prompt))
        tokens = self.generate(images, text, **options)
        return [self.tokenizer.decode(row) for row in tokens.tolist()]


def model_digest(config: ModelConfig, weights: Mapping[str, Tensor]) -> str:
    """Of config and weights: which model it is, whatever it is called and wherever it lies."""
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        some = tensor.detach().flatten()[:_DIGESTED].float()
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def _opened(picture: Image.Image | str | Path) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    try:
        return decode_image(Path(picture).read_bytes(), str(picture))
    except BadSample as bad:
        raise UserError(f"{picture}: {bad.cause.replace('_', ' ')}") from bad


def load_model(name: str, config: str | None = None, raw_weights: bool = False) -> LoadedModel:
    """Load a model in fp32 on the CPU, in evaluation mode.

    Args:
        name: a run folder, a checkpoint folder, an export, a weight file, `hf-hub:ORG/NAME`, or
            `NAME@TAG` of OpenCLIP's registry.
        config: for a weight file, the name or JSON file of its model config.
        raw_weights: of a run that averages its weights, take the last ones and not the average.

    Raises:
        UserError: not one of these, damaged, not reachable, or not a model of this package.
    """
    found = find_model(name, config, raw_weights)
    try:
        model = build_model(found.config, found.weights)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    tokenizer = make_tokenizer(found.config, found.folder)
    return LoadedModel(found.weights, found.config, model, tokenizer)


def model_config(name: str, config: str | None = None) -> ModelConfig:
    """A model's config, without a download where the name says what it is; as `find_model`."""
    model, separator, _ = name.partition("@")
    known = separator and not Path(name).exists() and model in available_models()
    return load_model_config(model) if known else find_model(name, config).config


def find_model(name: str, config: str | None = None, raw_weights: bool = False) -> Found:
    """A model's config, and its weights to be read; arguments and errors as of `load_model`."""
    path = Path(name)
    if path.is_dir():
        return _in_folder(path, raw_weights)
    if name.startswith(HUB_PREFIX):
        config_file, weight_file = hub_folder(name)
        return _in_file(weight_file, str(config_file))
    if path.is_file() or path.suffix in WEIGHT_SUFFIXES:
        if config is None:
            raise UserError(
                f"{name}: a weight file does not say what model it is; give its config, one of "
                f"{', '.join(available_models())}, or a JSON file"
            )
        return _in_file(path, config)
    model, separator, tag = name.partition("@")
    if separator:
        return _in_registry(model, tag)
    raise UserError(
        f"{name}: no such folder or file; a model is a run, a checkpoint, an exported folder, a "
        "weight file, hf-hub:ORG/NAME, or NAME@TAG"
    )


def pretrained_name(section: ModelSection) -> str:
    """`model.pretrained` as `find_model` takes it: a bare tag belongs to `model.name`."""
    name = section.pretrained
    assert name is not None
    is_place = "@" in name or name.startswith(HUB_PREFIX) or Path(name).exists()
    return name if is_place or Path(name).suffix in WEIGHT_SUFFIXES else f"{section.name}@{name}"


def _in_folder(folder: Path, raw_weights: bool) -> Found:
    if is_model_folder(folder):
        return Found(*read_folder(folder), folder)
    # DeepSpeed takes seconds to import, and only runs need it
    from coca_scale.engine.checkpoint import (
        MANIFEST,
        find_checkpoint,
        read_config,
        read_weights,
        verify_checkpoint,
    )

    checkpoint = folder if (folder / MANIFEST).is_file() else None
    checkpoint = checkpoint or find_checkpoint(folder / CHECKPOINTS)
    if checkpoint is None:
        raise UserError(
            f"{folder}: neither a run with a complete checkpoint, nor a checkpoint, nor a model "
            "folder with a config of OpenCLIP's"
        )
    verify_checkpoint(checkpoint)
    config = read_config(checkpoint)
    return Found(config, partial(read_weights, checkpoint, raw_weights), checkpoint.parents[1])


def _in_registry(model: str, tag: str) -> Found:
    file = None if model in available_models() else registry_config(model)
    config = load_model_config(str(file or model))  # its own message for an unknown model is first
    read = partial(read_openclip, registry_file(model, tag))
    said = {**config.to_dict(), **registry_facts(model, tag)}
    return Found(parse_model_config(said, f"{model}@{tag}"), read, None)


def _in_file(file: Path, config: str) -> Found:
    beside = Path(config).parent if config.endswith(".json") else None
    model, own_config = load_model_config(config), file.with_name(CONFIG_FILE)
    if file.name in (SAFETENSORS_FILE, BIN_FILE) and own_config.is_file():
        model = model.for_weights_of(load_model_config(str(own_config)))
    return Found(model, partial(read_openclip, file), beside)
