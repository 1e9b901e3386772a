"""Model configurations in OpenCLIP's JSON format.

Fields that OpenCLIP reads and this package does not implement are errors rather than ignored, so
that a config never means one thing here and another there.
"""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    field_validator,
    model_validator,
)

from coca_scale.errors import UserError
from coca_scale.model.hf_config import architecture
from coca_scale.model.preprocess import OPENAI, Preprocess
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
from coca_scale.recipe.files import read_json
from coca_scale.recipe.schema import LossSection, ModelSection

SIGMOID_START = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
CONFIG_FOLDER = Path(__file__).parent / "configs"


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VisionConfig(_Config):
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


class TextConfig(_Config):
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


class DecoderConfig(_Config):
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


class ModelConfig(_Config):
    """A whole CoCa; without `multimodal_cfg` a CLIP.

    `preprocess_cfg` stands beside the `model_cfg` in OpenCLIP's files; it is part of what a model
    is, since the same weights see something else in other pixels. A model with `init_logit_bias`
    has a bias beside its logit scale, as SigLIP's have.
    """

    embed_dim: Count
    vision_cfg: VisionConfig
    text_cfg: TextConfig
    multimodal_cfg: DecoderConfig | None = None
    custom_text: bool = False
    quick_gelu: bool = False
    init_logit_scale: FiniteFloat | None = None
    init_logit_bias: FiniteFloat | None = None
    preprocess_cfg: Preprocess = OPENAI

    @model_validator(mode="after")
    def _fits_together(self) -> ModelConfig:
        text = self.text_cfg
        if text.hf_model_name is None and text.width % text.heads:
            raise ValueError(f"text_cfg: width {text.width} over {text.heads} heads")
        if text.pad_id >= text.vocab_size:
            raise ValueError(f"text_cfg: pad_id {text.pad_id} is none of {text.vocab_size} tokens")
        if self.multimodal_cfg is not None:
            self._check_coca(self.multimodal_cfg)
        elif text.embed_cls or self.vision_cfg.attentional_pool not in (False, True):
            raise ValueError("text_cfg.embed_cls and two poolers belong to a CoCa: multimodal_cfg")
        return self

    def _check_coca(self, decoder: DecoderConfig) -> None:
        vision, text = self.vision_cfg, self.text_cfg
        if text.hf_model_name is None and not text.embed_cls:
            raise ValueError("a CoCa's text_cfg needs embed_cls: true")
        if vision.timm_model_name is not None and not vision.attentional_pool:
            raise ValueError("a timm image tower of a CoCa needs vision_cfg.attentional_pool: true")
        if vision.attentional_pool and self.embed_dim % vision.attn_pooler_heads:
            raise ValueError(
                f"vision_cfg: embed_dim {self.embed_dim} over {vision.attn_pooler_heads} heads"
            )
        token_width = self.embed_dim if vision.attentional_pool else vision.width
        if token_width != decoder.width:
            raise ValueError(
                f"image tokens are {token_width} wide, multimodal_cfg.width is {decoder.width}"
            )
        if text.width != decoder.width:
            raise ValueError(
                f"text_cfg.width {text.width} and multimodal_cfg.width {decoder.width} differ"
            )
        if text.context_length - 1 > decoder.context_length:
            raise ValueError("text_cfg.context_length exceeds multimodal_cfg.context_length")
        if text.vocab_size != decoder.vocab_size:
            raise ValueError(
                f"text_cfg.vocab_size {text.vocab_size} and multimodal_cfg.vocab_size "
                f"{decoder.vocab_size} differ"
            )
        if decoder.width % decoder.heads:
            raise ValueError(f"multimodal_cfg: width {decoder.width} over {decoder.heads} heads")

    @classmethod
    def from_recipe(cls, section: ModelSection) -> ModelConfig:
        """The model that a recipe asks for.

        Raises:
            UserError: unknown model, or sizes that do not fit it.
        """
        config = load_model_config(section.name)
        return config.resized(section.image_size, section.context_length, section.patch_dropout)

    @property
    def context_length(self) -> int:
        """Tokens per caption, start and end tokens included."""
        return self.text_cfg.context_length

    @property
    def pad_id(self) -> int:
        """Token id of padding."""
        return self.text_cfg.pad_id

    def to_dict(self) -> dict[str, Any]:
        """The JSON object this config was made of: only fields that were given."""
        return self.model_dump(mode="json", exclude_unset=True)

    def for_loss(self, loss: LossSection) -> ModelConfig:
        """This model with the bias that its loss trains; one of its own begins as it says.

        Sigmoid begins with a scale of 10 and a bias of -10, at which all pairs look unlike (Zhai
        et al. 2023, section 3.1).
        """
        if loss.contrastive == "softmax" or self.init_logit_bias is not None:
            return self
        return self.model_copy(update=SIGMOID_START)

    def for_weights_of(self, trained: ModelConfig) -> ModelConfig:
        """This model for weights of another config: as they were trained in what it leaves open.

        That is QuickGELU, a bias of logits, and how pictures become pixels.
        """
        found: dict[str, Any] = {}
        if self.init_logit_bias is None and trained.init_logit_bias is not None:
            found = trained.model_dump(include=set(SIGMOID_START), exclude_unset=True)
        if "quick_gelu" not in self.model_fields_set and trained.quick_gelu:
            found["quick_gelu"] = True
        preprocess = trained.preprocess_cfg.but_as(self.preprocess_cfg)
        if preprocess != self.preprocess_cfg:
            found["preprocess_cfg"] = preprocess
        return self.model_copy(update=found)

    def resized(
        self,
        image_size: int | None = None,
        context_length: int | None = None,
        patch_dropout: float | None = None,
    ) -> ModelConfig:
        """The same model for another image size, caption length or patch dropout.

        Raises:
            UserError: the result is not a valid model.
        """
        raw = self.to_dict()
        if image_size is not None:
            raw["vision_cfg"]["image_size"] = image_size
        if patch_dropout is not None:
            raw["vision_cfg"]["patch_dropout"] = patch_dropout
        if context_length is not None:
            raw["text_cfg"]["context_length"] = context_length
            if self.multimodal_cfg is not None:
                raw["multimodal_cfg"]["context_length"] = context_length
        return parse_model_config(raw, "model")


def available_models() -> list[str]:
    """Names of the shipped configs."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.json"))


def load_model_config(name: str) -> ModelConfig:
    """A shipped config by name, or any OpenCLIP-format JSON file by path.

    Raises:
        UserError: unknown name, unreadable file, or a field that is not supported.
    """
    path = Path(name) if name.endswith(".json") else CONFIG_FOLDER / f"{name}.json"
    if not path.is_file():
        near = difflib.get_close_matches(name, available_models(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"model {name!r} is not known; {hint}Shipped: {', '.join(available_models())}; "
            "or give the path of an OpenCLIP JSON file"
        )
    raw = read_json(path)
    if isinstance(raw, dict) and "model_cfg" in raw:
        raw = _joined(raw["model_cfg"], raw.get("preprocess_cfg"))
    return parse_model_config(raw, str(path))


def _joined(model: Any, preprocess: Any) -> Any:
    """The two parts of OpenCLIP's files for published weights as one object."""
    given = isinstance(model, dict) and preprocess is not None
    return {**model, "preprocess_cfg": preprocess} if given else model


def parse_model_config(raw: Any, origin: str) -> ModelConfig:
    """Validate OpenCLIP's `model_cfg`.

    What is left open follows from the rest: a Hugging Face tower brings its own width, vocabulary
    and padding, and the decoder has the vocabulary of the text tower.

    Raises:
        UserError: a field is unknown, unsupported or does not fit the others.
    """
    try:
        return ModelConfig.model_validate(_completed(raw, origin))
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            field = ".".join(str(p) for p in fault["loc"])
            unsupported = fault["type"] == "extra_forbidden"
            message = fault["msg"].removeprefix("Value error, ")
            message = "not supported by coca-scale" if unsupported else message
            lines.append(f"{origin}: {field + ': ' if field else ''}{message}")
        raise UserError("\n".join(lines)) from error


def _completed(raw: Any, origin: str) -> Any:
    """`raw` with the fields filled in that OpenCLIP's files leave open."""
    text = raw.get("text_cfg") if isinstance(raw, dict) else None
    if not isinstance(text, dict):
        return raw  # left to the validation
    text, decoder = dict(text), raw.get("multimodal_cfg")
    if text.get("hf_model_name") is not None:
        found = architecture(str(text["hf_model_name"]), text.get("hf_config"), origin)
        text["hf_config"] = found
        text["width"] = found["hidden_size"]
        text.setdefault("vocab_size", found["vocab_size"])
        text.setdefault("pad_id", found["pad_token_id"])
    completed = {**raw, "text_cfg": text}
    if isinstance(decoder, dict):
        vocab_size = text.get("vocab_size", TextConfig.model_fields["vocab_size"].default)
        completed["multimodal_cfg"] = {"vocab_size": vocab_size, **decoder}
    return completed
