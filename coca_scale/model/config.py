"""A whole model as OpenCLIP's JSON describes it: its parts fit together, and where it is found."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from coca_scale.errors import UserError
from coca_scale.model.hf_config import architecture
from coca_scale.model.preprocess import OPENAI, Preprocess
from coca_scale.model.sizes import Count
from coca_scale.model.tower_config import Config, DecoderConfig, TextConfig, VisionConfig
from coca_scale.recipe.files import read_json
from coca_scale.recipe.schema import ModelSection

CONFIG_FOLDER = Path(__file__).parent / "configs"


class ModelConfig(Config):
    """A whole CoCa; without `multimodal_cfg` a CLIP.

    `preprocess_cfg` stands beside the `model_cfg` in OpenCLIP's files; it is part of what a model
    is, since the same weights see something else in other pixels.
    """

    embed_dim: Count
    vision_cfg: VisionConfig
    text_cfg: TextConfig
    multimodal_cfg: DecoderConfig | None = None
    custom_text: bool = False
    quick_gelu: bool = False
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

    def for_weights_of(self, trained: ModelConfig) -> ModelConfig:
        """This model for weights of another config: as they were trained in what it leaves open.

        That is QuickGELU, and how pictures become pixels.
        """
        found: dict[str, Any] = {}
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
