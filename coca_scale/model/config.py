"""A whole model as OpenCLIP's JSON describes it: its parts fit together, and where it is found."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat, ValidationError, model_validator

from coca_scale.errors import UserError
from coca_scale.model.hf_config import architecture
from coca_scale.model.preprocess import OPENAI, Preprocess
from coca_scale.model.sizes import Count
from coca_scale.model.tower_config import (
    MAMMUT_FIELDS,
    Config,
    DecoderConfig,
    TextConfig,
    TransformerConfig,
    VisionConfig,
)
from coca_scale.recipe.files import read_json
from coca_scale.recipe.schema import LossSection, ModelSection

SIGMOID_START = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
CONFIG_FOLDER = Path(__file__).parent / "configs"


class ModelConfig(Config):
    """A whole CoCa; without `multimodal_cfg` a CLIP, without `text_cfg` a MaMMUT.

    `preprocess_cfg` stands beside the `model_cfg` in OpenCLIP's files; it is part of what a model
    is, since the same weights see something else in other pixels. A model with `init_logit_bias`
    has a bias beside its logit scale, as SigLIP's have.
    """

    embed_dim: Count
    vision_cfg: VisionConfig
    text_cfg: TextConfig | None = None
    multimodal_cfg: DecoderConfig | None = None
    custom_text: bool = False
    quick_gelu: bool = False
    init_logit_scale: FiniteFloat | None = None
    init_logit_bias: FiniteFloat | None = None
    preprocess_cfg: Preprocess = OPENAI

    @model_validator(mode="after")
    def _fits_together(self) -> ModelConfig:
        text, decoder = self.text_cfg, self.multimodal_cfg
        if text is None:
            if decoder is None:
                raise ValueError(
                    "text_cfg is missing: of a CLIP or CoCa; of a MaMMUT, multimodal_cfg"
                )
            self._check_mammut(decoder)
            return self
        if text.hf_model_name is None and text.width % text.heads:
            raise ValueError(f"text_cfg: width {text.width} over {text.heads} heads")
        if text.pad_id >= text.vocab_size:
            raise ValueError(f"text_cfg: pad_id {text.pad_id} is none of {text.vocab_size} tokens")
        if decoder is not None:
            self._check_coca(text, decoder)
        elif text.embed_cls or self.vision_cfg.attentional_pool not in (False, True):
            raise ValueError("text_cfg.embed_cls and two poolers belong to a CoCa: multimodal_cfg")
        return self

    def _check_coca(self, text: TextConfig, decoder: DecoderConfig) -> None:
        vision = self.vision_cfg
        if text.hf_model_name is None and not text.modern and not text.embed_cls:
            raise ValueError("a CoCa's text_cfg needs embed_cls: true")
        if given := sorted(decoder.model_fields_set & MAMMUT_FIELDS):
            raise ValueError(f"multimodal_cfg: {', '.join(given)} belong to a MaMMUT: no text_cfg")
        if not decoder.modern and decoder.cross_attn_ratio != 1:
            raise ValueError("multimodal_cfg.cross_attn_ratio: in a CoCa of text_arch modern only")
        if not decoder.modern and decoder.mlp_ratio != 4:
            raise ValueError(
                "multimodal_cfg: OpenCLIP builds a CoCa's decoder with mlp_ratio 4 only"
            )
        if vision.timm_model_name is not None and not vision.attentional_pool:
            raise ValueError("a timm image tower of a CoCa needs vision_cfg.attentional_pool: true")
        self._check_decoder(decoder)
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

    def _check_mammut(self, decoder: DecoderConfig) -> None:
        if self.vision_cfg.timm_model_name is not None or self.vision_cfg.attentional_pool:
            raise ValueError("a MaMMUT's image tower is a ViT of this package without a pooler")
        self._check_decoder(decoder)
        if decoder.pad_id >= decoder.vocab_size:
            raise ValueError(
                f"multimodal_cfg: pad_id {decoder.pad_id} is none of {decoder.vocab_size} tokens"
            )
        if decoder.proj_type == "none" and self.embed_dim != decoder.width:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not multimodal_cfg.width {decoder.width}, which "
                'without a projection it has to be; or give proj_type: "linear"'
            )

    def _check_decoder(self, decoder: DecoderConfig) -> None:
        vision = self.vision_cfg
        if vision.attentional_pool and self.embed_dim % vision.attn_pooler_heads:
            raise ValueError(
                f"vision_cfg: embed_dim {self.embed_dim} over {vision.attn_pooler_heads} heads"
            )
        if decoder.width % decoder.heads:
            raise ValueError(f"multimodal_cfg: width {decoder.width} over {decoder.heads} heads")

    @property
    def has_foreign_towers(self) -> bool:
        """Whether a tower is one of timm or transformers, which make their weights themselves."""
        return bool(self.vision_cfg.timm_model_name or self.text.hf_model_name)

    @property
    def text(self) -> TextConfig:
        """What a text is to this model; of a MaMMUT, what its decoder says of it."""
        if self.text_cfg is not None:
            return self.text_cfg
        assert self.multimodal_cfg is not None
        shared = self.multimodal_cfg.model_dump(
            include=set(TransformerConfig.model_fields), exclude_unset=True
        )
        pooled = {"pool_type": "mean"} if self.multimodal_cfg.modern else {}
        return TextConfig(**shared, **pooled)

    @property
    def family(self) -> str:
        """What people call such a model."""
        if self.multimodal_cfg is None:
            return "CLIP"
        if self.text_cfg is None:
            return "MaMMUT"
        return "CoCa2" if isinstance(self.vision_cfg.attentional_pool, str) else "CoCa"

    @property
    def text_section(self) -> str:
        """Where its vocabulary and tokenizer stand."""
        return "multimodal_cfg" if self.text_cfg is None else "text_cfg"

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
        return self.text.context_length

    @property
    def pad_id(self) -> int:
        """Token id of padding."""
        return self.text.pad_id

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
            for part in ("text_cfg", "multimodal_cfg"):
                if getattr(self, part) is not None:
                    raw[part]["context_length"] = context_length
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
    if isinstance(text, dict) and text.get("does_full_decoding") is True:
        return _from_laion(raw, text)
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


def _from_laion(raw: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """A MaMMUT as LAION's fork of OpenCLIP describes it, which had no `multimodal_cfg` for it."""
    decoder = {k: v for k, v in text.items() if k not in ("does_full_decoding", "embed_cls")}
    legacy = {"pool_type": "avg_all", "use_pad_mask": False, "proj_type": "none"}
    vision = raw.get("vision_cfg")
    if isinstance(vision, dict) and vision.get("global_average_pool") is True:
        vision = {k: v for k, v in vision.items() if k != "global_average_pool"}
        vision |= {"pool_type": "avg_all", "final_ln_after_pool": True}
    rest = {k: v for k, v in raw.items() if k not in ("text_cfg", "custom_text")}
    return {**rest, "vision_cfg": vision, "multimodal_cfg": {**decoder, **legacy}}
