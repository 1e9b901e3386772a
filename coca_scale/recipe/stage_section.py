"""The keys of a stage: what a part of a run has of its own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from coca_scale.recipe.data import Sources
from coca_scale.recipe.loss_weights import LossWeight
from coca_scale.recipe.section import MAX_STEPS, NonNegativeInt, PositiveInt, SampleCount, Section

STAGE_LENGTHS = ("steps", "samples")
# of the recipe that a stage may change, by section
STAGE_KEYS = {
    "model": (
        *("image_size", "context_length", "patch_dropout", "lock_image", "image_unlocked_groups"),
        *("lock_text", "text_unlocked_groups"),
    ),
    "data": ("crop_scale_min", "train"),
    "loss": ("contrastive_weight", "caption_weight"),
    "optim": ("lr",),
    "schedule": ("warmup_steps",),
    "train": ("global_batch", "micro_batch"),
    "engine": ("activation_checkpointing",),
}


class StageSection(Section):
    """A part of a run. What it does not name is as the recipe's sections have it."""

    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = Field(
        None, description="Length in optimizer steps."
    )
    samples: SampleCount | None = Field(None, description="Length in samples seen.")
    image_size: Annotated[int, Field(ge=1, le=2**14)] | None = Field(
        None, description="Pixels per side; positions are interpolated where it changes."
    )
    context_length: Annotated[int, Field(ge=3, le=2**16)] | None = Field(
        None, description="Tokens per caption; new positions start as the last one."
    )
    patch_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(
        None, description="Share of image patches left out."
    )
    crop_scale_min: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None, description="Smallest area fraction of the random training crop."
    )
    train: Sources | None = Field(
        None,
        description="Training data, as data.train. It goes on where an earlier stage left the same "
        "data, and begins at its beginning otherwise.",
    )
    global_batch: PositiveInt | None = Field(None, description="Samples per optimizer step.")
    micro_batch: PositiveInt | None = Field(None, description="Samples per rank and forward pass.")
    activation_checkpointing: Literal["none", "selective", "full", "auto"] | None = Field(
        None, description="What the backward pass computes again."
    )
    lr: Annotated[float, Field(gt=0.0)] | None = Field(
        None,
        description="Peak of a schedule that begins here, with the shape of `schedule`, for this "
        "stage and those after it; null goes on with the schedule of the stage before.",
    )
    warmup_steps: NonNegativeInt | None = Field(
        None, description="Of the schedule that begins here; 0 where a later stage names an lr."
    )
    lr_factor: Annotated[float, Field(gt=0.0)] = Field(
        1.0, description="On the learning rate that the schedule gives, in this stage."
    )
    contrastive_weight: LossWeight | None = Field(
        None,
        description="Factor, a number or points; those of a stage are counted over the stage, "
        "those of the section loss over the run.",
    )
    caption_weight: LossWeight | None = Field(None, description="Factor, likewise.")
    lock_image: bool | None = Field(None, description="Keep the image tower as it is.")
    image_unlocked_groups: NonNegativeInt | None = Field(
        None, description="lock_image: layer groups at the end that train."
    )
    lock_text: bool | None = Field(None, description="Keep the text tower as it is.")
    text_unlocked_groups: NonNegativeInt | None = Field(
        None, description="lock_text: layer groups at the end that train."
    )

    @model_validator(mode="after")
    def _one_length(self) -> StageSection:
        given = [key for key in STAGE_LENGTHS if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of steps, samples (found: {', '.join(given) or 'none'})"
            )
        return self

    def sections(self) -> dict[str, dict[str, Any]]:
        """What it names, in the recipe's sections; lengths and factors are not of these."""
        named = self.model_dump(exclude_none=True)
        return {
            section: {key: named[key] for key in keys if key in named}
            for section, keys in STAGE_KEYS.items()
        }
