"""How pictures become what an image tower takes: OpenCLIP's `preprocess_cfg`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, field_validator, model_validator

Mean = Annotated[float, Strict(), Field(ge=0, le=1)]
Deviation = Annotated[float, Strict(), Field(ge=1e-4, le=1)]  # a step of 8-bit pixels is 0.004
CHANNELS = 3


class Preprocess(BaseModel):
    """What weights were trained with, beside the architecture; the defaults are OpenAI's CLIP's.

    Fields, defaults and what they mean are those of OpenCLIP 3.3, which its CoCa models leave as
    they are. As there, an empty value is the default, one number stands for three channels, and
    what it does not read is passed over: `size` too, since the model's image size decides.

    Attributes:
        mode: colour channels.
        mean: of each channel, black being 0 and white 1.
        std: standard deviation of each channel.
        interpolation: of resizing for evaluations; "random" is bicubic there, as training crops
            always are.
        resize_mode: for evaluations: "shortest" side to the image size and the centre cut out,
            "longest" side and the rest filled, or "squash" to a square.
        fill_color: around a picture resized by its longest side, 0 to 255.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    mode: Literal["RGB"] = "RGB"
    mean: tuple[Mean, Mean, Mean] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[Deviation, Deviation, Deviation] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: Annotated[int, Strict(), Field(ge=0, le=255)] = 0

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, raw: Any) -> Any:
        if isinstance(raw, dict):
            return {key: value for key, value in raw.items() if value}
        if raw and not isinstance(raw, Preprocess):
            raise ValueError("should be an object with fields such as mean and std")
        return raw or {}

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _per_channel(cls, value: Any) -> Any:
        given = tuple(value) if isinstance(value, list | tuple) else (value,)
        if len(given) not in (1, CHANNELS):
            raise ValueError("should be one number, or one for each of three channels")
        return given * CHANNELS if len(given) == 1 else given

    def but_as(self, other: Preprocess) -> Preprocess:
        """This, with the fields that `other` gives."""
        return self.model_copy(update=other.model_dump(exclude_unset=True))

    def __str__(self) -> str:
        """For a line in a log, without what is OpenAI's."""
        fields = self.model_dump(exclude_defaults=True).items()
        text = ", ".join(f"{name} {value}" for name, value in fields)
        return f"preprocess_cfg {text}" if text else "OpenAI's preprocess_cfg"


OPENAI = Preprocess()
