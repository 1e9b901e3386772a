"""Towers and decoder as OpenCLIP's JSON describes them.

Fields that OpenCLIP reads and this package does not implement are errors rather than ignored, so
that a config never means one thing here and another there.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from coca_scale.model.sizes import (
    MOST_PATCHES,
    Count,
    Layers,
    MlpRatio,
    Name,
    Pixels,
    TokenId,
    Vocabulary,
)


class Config(BaseModel):
    """Strict and fixed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class VisionConfig(Config):
    """The image tower: a ViT, or with `timm_model_name` any timm model as OpenCLIP wraps it.

    `attentional_pool` says how tokens and the pooled vector are made: true is what OpenCLIP's
    published CoCa models use (one pooler, its first query is the pooled vector); "cascade" and
    "parallel" are the paper's two poolers, the contrastive one reading the tokens of the generative
    one, or the image.
    """

    image_size: Pixels = 224
    patch_size: Pixels = 16
    width: Count = 768
    layers: Layers = 12
    head_width: Count = 64
    mlp_ratio: MlpRatio = 4.0
    patch_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    attentional_pool: bool | Literal["cascade", "parallel"] = False
    attn_pooler_queries: Annotated[Count, Field(ge=2)] = 256
    attn_pooler_heads: Count = 8
    pool_type: Literal["tok"] = "tok"
    output_tokens: bool = False
    timm_model_name: Name | None = None
    timm_model_pretrained: bool = False
    timm_pool: Literal["avg", "token", "map"] = "avg"
    timm_proj: Literal["linear"] = "linear"
    timm_proj_bias: bool = False

    @property
    def label(self) -> str:
        """As a model card calls it."""
        return self.timm_model_name or f"ViT, patches of {self.patch_size} px"

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.width // self.head_width

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @field_validator("layers", mode="before")
    @classmethod
    def _no_modified_resnet(cls, layers: Any) -> Any:
        if isinstance(layers, list):
            raise ValueError(
                "OpenAI's ModifiedResNet is not built here; name a ResNet of timm instead, "
                "for example timm_model_name: resnet50_gn"
            )
        return layers

    @model_validator(mode="after")
    def _divides(self) -> VisionConfig:
        if self.timm_model_name is not None:
            if self.patch_dropout:
                raise ValueError("patch_dropout is for ViTs of this package, not for timm models")
            return self
        if self.width % self.head_width:
            raise ValueError(f"width {self.width} is not a multiple of head_width")
        if self.image_size < self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is smaller than patch_size {self.patch_size}"
            )
        if self.grid**2 > MOST_PATCHES:
            raise ValueError(
                f"image_size {self.image_size} in patches of {self.patch_size} gives more than "
                f"{MOST_PATCHES} of them"
            )
        return self


class TextConfig(Config):
    """The unimodal text tower: a causal transformer, or with `hf_model_name` a Hugging Face model.

    In a CoCa (`embed_cls`) a CLS token follows the caption, not counted by `context_length`; in a
    CLIP the feature is read at the end token, which `pool_type` says how to find: the highest id,
    or `eos_id`.
    """

    context_length: Annotated[Count, Field(ge=3)] = 77
    vocab_size: Vocabulary = 49408
    width: Count = 512
    heads: Count = 8
    layers: Layers = 12
    mlp_ratio: MlpRatio = 4.0
    embed_cls: bool = False
    correct_cls_mask: bool = False
    pad_id: TokenId = 0
    pool_type: Literal["argmax", "eos"] = "argmax"
    eos_id: TokenId = 2
    output_tokens: bool = False
    hf_tokenizer_name: Name | None = None
    hf_model_name: Name | None = None
    hf_model_pretrained: bool = True
    hf_proj_type: Literal["linear", "mlp"] = "mlp"
    hf_pooler_type: Literal["mean_pooler"] = "mean_pooler"
    hf_config: dict[str, Any] | None = None  # ours: the architecture, so that a run needs no hub

    @property
    def label(self) -> str:
        """As a model card calls it."""
        return self.hf_model_name or f"transformer, {self.layers} × {self.width}"


class DecoderConfig(Config):
    """The multimodal decoder.

    `mlp_ratio`, `dim_head`, `n_queries` and `attn_pooler_heads` are listed in OpenCLIP's files but
    not used by it; `mlp_ratio` is therefore accepted only at the 4 that OpenCLIP always builds.
    """

    context_length: Count = 77
    vocab_size: Vocabulary = 49408
    width: Count = 512
    heads: Count = 8
    layers: Layers = 12
    mlp_ratio: Literal[4] = 4
    dim_head: Count = 64
    n_queries: Count = 256
    attn_pooler_heads: Count = 8
