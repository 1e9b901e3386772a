"""Model configurations in OpenCLIP's JSON format.

Fields that OpenCLIP reads and this package does not implement are errors rather than ignored, so
that a config never means one thing here and another there.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

CONFIG_FOLDER = Path(__file__).parent / "configs"

Size = Annotated[int, Field(ge=1)]


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VisionConfig(_Config):
    """The image tower, a ViT."""

    image_size: Size = 224
    patch_size: Size = 16
    width: Size = 768
    layers: Size = 12
    head_width: Size = 64
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    attentional_pool: bool = False
    attn_pooler_queries: Annotated[int, Field(ge=2)] = 256
    attn_pooler_heads: Size = 8
    output_tokens: Literal[True] = True

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.width // self.head_width

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @model_validator(mode="after")
    def _divides(self) -> VisionConfig:
        if self.width % self.head_width:
            raise ValueError(f"width {self.width} is not a multiple of head_width")
        if self.image_size < self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is smaller than patch_size {self.patch_size}"
            )
        return self


class TextConfig(_Config):
    """The unimodal text tower. `context_length` does not count its CLS token."""

    context_length: Annotated[int, Field(ge=3)] = 77
    vocab_size: Size = 49408
    width: Size = 512
    heads: Size = 8
    layers: Size = 12
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    embed_cls: Literal[True]
    pad_id: Literal[0] = 0
    output_tokens: Literal[True] = True
    hf_tokenizer_name: str | None = None


class DecoderConfig(_Config):
    """The multimodal decoder.

    `mlp_ratio`, `dim_head`, `n_queries` and `attn_pooler_heads` are listed in OpenCLIP's files but
    not used by it; `mlp_ratio` is therefore accepted only at the 4 that OpenCLIP always builds.
    """

    context_length: Size = 77
    vocab_size: Size = 49408
    width: Size = 512
    heads: Size = 8
    layers: Size = 12
    mlp_ratio: Literal[4] = 4
    dim_head: Size = 64
    n_queries: Size = 256
    attn_pooler_heads: Size = 8


class ModelConfig(_Config):
    """A whole CoCa."""

    embed_dim: Size
    vision_cfg: VisionConfig
    text_cfg: TextConfig
    multimodal_cfg: DecoderConfig
    custom_text: Literal[True] = True
    quick_gelu: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> ModelConfig:
        vision, text, decoder = self.vision_cfg, self.text_cfg, self.multimodal_cfg
        token_width = self.embed_dim if vision.attentional_pool else vision.width
        if token_width != decoder.width:
            raise ValueError(
                f"image tokens are {token_width} wide, multimodal_cfg.width is {decoder.width}"
            )
        if text.width != decoder.width:
            raise ValueError(
                f"text_cfg.width {text.width} and multimodal_cfg.width {decoder.width} differ"
            )
        if text.context_length > decoder.context_length:
            raise ValueError("text_cfg.context_length exceeds multimodal_cfg.context_length")
        if text.vocab_size != decoder.vocab_size:
            raise ValueError("text_cfg.vocab_size and multimodal_cfg.vocab_size differ")
        for part, config in (("text_cfg", text), ("multimodal_cfg", decoder)):
            if config.width % config.heads:
                raise ValueError(f"{part}: width {config.width} over {config.heads} heads")
        return self

    @property
    def context_length(self) -> int:
        """Tokens per caption, start and end tokens included."""
        return self.text_cfg.context_length

    @property
    def pad_id(self) -> int:
        """Token id of padding."""
        return self.text_cfg.pad_id

    def to_openclip(self) -> dict[str, Any]:
        """The JSON object OpenCLIP reads as `model_cfg`: only fields that were given."""
        return self.model_dump(exclude_unset=True)

    def resized(
        self, image_size: int | None = None, context_length: int | None = None
    ) -> ModelConfig:
        """The same model for another image size or caption length.

        Raises:
            ValueError: the result is not a valid model.
        """
        raw = self.to_openclip()
        if image_size is not None:
            raw["vision_cfg"]["image_size"] = image_size
        if context_length is not None:
            raw["text_cfg"]["context_length"] = context_length
            raw["multimodal_cfg"]["context_length"] = context_length
        return parse_model_config(raw, "model")


def available_models() -> list[str]:
    """Names of the shipped configs."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.json"))


def load_model_config(name: str) -> ModelConfig:
    """A shipped config by name, or any OpenCLIP-format JSON file by path.

    Raises:
        ValueError: unknown name, unreadable file, or a field that is not supported.
    """
    path = Path(name) if name.endswith(".json") else CONFIG_FOLDER / f"{name}.json"
    if not path.is_file():
        near = difflib.get_close_matches(name, available_models(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"model {name!r} is not known; {hint}Shipped: {', '.join(available_models())}; "
            "or give the path of an OpenCLIP JSON file"
        )
    try:
        raw = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    return parse_model_config(
        raw.get("model_cfg", raw) if isinstance(raw, dict) else raw, str(path)
    )


def parse_model_config(raw: Any, origin: str) -> ModelConfig:
    """Validate OpenCLIP's `model_cfg`.

    Raises:
        ValueError: a field is unknown, unsupported or does not fit the others.
    """
    try:
        return ModelConfig.model_validate(raw)
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            field = ".".join(str(p) for p in fault["loc"])
            unsupported = fault["type"] == "extra_forbidden"
            message = "not supported by coca-scale" if unsupported else fault["msg"]
            lines.append(f"{origin}: {field + ': ' if field else ''}{message}")
        raise ValueError("\n".join(lines)) from error
