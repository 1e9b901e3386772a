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
    "parallel" are the paper's two poolers, as CoCa2 has them: the contrastive one reads the tokens
    of the generative one, or the image. Without a pooler `pool_type` makes the vector: the class
    token, or the mean of the patches, or of both ("avg_all", which a decoder then reads, too).
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
    pool_type: Literal["tok", "avg", "avg_all"] = "tok"
    final_ln_after_pool: bool = False
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
            if self.pool_type != "tok" or self.final_ln_after_pool:
                raise ValueError("a timm model is pooled as timm_pool says, not pool_type")
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


class TransformerConfig(Config):
    """A transformer over text: its vocabulary, its ids, its shape.

    `text_arch` "clip" is what CLIP and CoCa have had; "modern" is OpenCLIP's causal tower with
    rotary positions (Su et al. 2021) instead of a table, RMSNorm (Zhang & Sennrich 2019), SwiGLU
    (Shazeer 2020), and where asked for normalised queries and keys (Dehghani et al. 2023) and a
    gate on the output of attention (Qiu et al. 2025). The fields after it are for "modern" alone,
    but `mlp_ratio`. `freeze_pad_embed`, true unless it says false, is its: the embedding of padding
    is zero and stays so.

    `variable_text` is accepted and changes nothing: captions are always computed at their length.
    """

    context_length: Annotated[Count, Field(ge=3)] = 77
    variable_text: bool = False
    vocab_size: Vocabulary = 49408
    width: Count = 512
    heads: Count = 8
    layers: Layers = 12
    mlp_ratio: MlpRatio = 4.0
    pad_id: TokenId = 0
    bos_id: TokenId | None = None
    eos_id: TokenId = 2
    output_tokens: bool = False
    hf_tokenizer_name: Name | None = None
    text_arch: Literal["clip", "modern"] = "clip"
    attention_mode: Literal["causal"] = "causal"
    pos_embed: Literal["rope", "none"] = "rope"
    rope_temperature: Annotated[float, Field(gt=1, le=1e9)] = 10000.0
    mlp_type: Literal["swiglu", "mlp"] = "swiglu"
    norm_type: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: Annotated[float, Field(gt=0, le=1e-2)] = 1e-6
    qk_norm: bool = False
    attn_gated: bool = False
    attention_bias: bool = False
    gate_bias: bool | None = None
    mlp_bias: bool = False
    freeze_pad_embed: bool | None = None

    @property
    def modern(self) -> bool:
        """Whether it is of the modern kind."""
        return self.text_arch == "modern"

    @property
    def pad_is_frozen(self) -> bool:
        """Whether the embedding of padding is zero."""
        return self.modern and self.freeze_pad_embed is not False

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> TransformerConfig:
        if not self.modern:
            given = sorted(self.model_fields_set & MODERN_FIELDS)
            if given:
                raise ValueError(f'{", ".join(given)}: for text_arch "modern" alone')
        elif self.width % self.heads or (self.pos_embed == "rope" and self.width // self.heads % 2):
            raise ValueError(
                f"width {self.width} over {self.heads} heads: a modern transformer needs a whole, "
                "with rotary positions even, width of each"
            )
        return self


MODERN_FIELDS = {
    *("pos_embed", "rope_temperature", "mlp_type", "norm_type", "norm_eps", "qk_norm"),
    *("attn_gated", "attention_bias", "gate_bias", "mlp_bias", "freeze_pad_embed"),
}


class TextConfig(TransformerConfig):
    """The unimodal text tower: a causal transformer, or with `hf_model_name` a Hugging Face model.

    In a CoCa (`embed_cls`) a CLS token follows the caption, not counted by `context_length`; in a
    CLIP and in a modern tower the feature is read at the end token, which `pool_type` says how to
    find: the highest id, or `eos_id`. A modern tower can take the mean of all tokens instead.
    """

    embed_cls: bool = False
    correct_cls_mask: bool = False
    pool_type: Literal["argmax", "eos", "mean"] = "argmax"
    hf_model_name: Name | None = None
    hf_model_pretrained: bool = True
    hf_proj_type: Literal["linear", "mlp"] = "mlp"
    hf_pooler_type: Literal["mean_pooler"] = "mean_pooler"
    hf_config: dict[str, Any] | None = None  # ours: the architecture, so that a run needs no hub

    @property
    def label(self) -> str:
        """As a model card calls it."""
        kind = "modern transformer" if self.modern else "transformer"
        return self.hf_model_name or f"{kind}, {self.layers} × {self.width}"

    @property
    def reads_the_end(self) -> bool:
        """Whether the feature is read where `eos_id` stands."""
        by_id = self.pool_type == "eos" or (self.modern and self.pool_type == "argmax")
        return by_id and self.hf_model_name is None

    @model_validator(mode="after")
    def _is_pooled(self) -> TextConfig:
        if self.modern:
            if self.embed_cls or self.hf_model_name is not None:
                raise ValueError("a modern text tower has neither embed_cls nor hf_model_name")
            if self.pool_type != "mean" and "eos_id" not in self.model_fields_set:
                raise ValueError("a modern text tower is pooled at its end token: give eos_id")
        elif self.pool_type == "mean":
            raise ValueError('pool_type "mean" is for text_arch "modern" alone')
        return self


class DecoderConfig(TransformerConfig):
    """The multimodal decoder; in a MaMMUT, which has no `text_cfg`, the one text tower.

    OpenCLIP lists `dim_head`, `n_queries` and `attn_pooler_heads` and does not use them. One block
    of `cross_attn_ratio`, the first, attends to the image; in the classic decoder of a CoCa all do,
    and OpenCLIP builds that with an `mlp_ratio` of 4 whatever is given. The other fields are
    MaMMUT's: how captions are pooled, and whether that is projected. LAION's weights were trained
    with padding as a part of the caption: `pool_type: avg_all` and `use_pad_mask: false`.
    """

    dim_head: Count = 64
    n_queries: Count = 256
    attn_pooler_heads: Count = 8
    cross_attn_ratio: Count = 1
    use_pad_mask: bool = True
    pool_type: Literal["avg", "avg_all"] = "avg"
    proj_type: Literal["none", "linear"] = "none"
    tie_lm_head: Literal[False] = False

    @property
    def label(self) -> str:
        """As a model card calls it."""
        kind = "modern transformer" if self.modern else "transformer"
        return f"{kind}, {self.layers} × {self.width}"

    @model_validator(mode="after")
    def _is_pooled(self) -> DecoderConfig:
        if self.cross_attn_ratio > self.layers:
            raise ValueError(f"cross_attn_ratio {self.cross_attn_ratio} of {self.layers} layers")
        if (self.pool_type == "avg_all") != (not self.use_pad_mask):
            raise ValueError("pool_type avg_all and use_pad_mask false belong together")
        if self.modern and not self.use_pad_mask:
            raise ValueError("a modern MaMMUT has no padding in its captions: use_pad_mask true")
        return self


MAMMUT_FIELDS = {"use_pad_mask", "pool_type", "proj_type"}
