"""The keys of a recipe that say what a model learns from a teacher."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from coca_scale.recipe.section import PathText, Section


class DistillSection(Section):
    """A teacher that runs beside the model, or its features as they were stored before."""

    teacher: PathText | None = Field(
        None,
        description="Model that runs beside the one that trains, whatever `coca-scale caption` "
        "takes; or the folder in which `coca-scale data embed` has stored a model's features.",
    )
    config: PathText | None = Field(
        None, description="Of a teacher's weight file: name or JSON file of its model config."
    )
    weight: Annotated[float, Field(ge=0.0)] = Field(
        1.0, description="Factor of the cross-entropy between similarities."
    )
    feature_weight: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="Factor of 1 − cos to the teacher's features, which need the same size."
    )
    placement: Literal["auto", "replicated", "sharded"] = Field(
        "auto",
        description="Where a running teacher's weights are: whole on every rank; cut over all "
        "ranks and gathered block by block; or whole where there is planned to be room for it.",
    )

    def weights(self) -> dict[str, float]:
        """Of the losses that a teacher brings, by name; 0 without one."""
        found = {"distill": self.weight, "distill_features": self.feature_weight}
        return found if self.teacher is not None else dict.fromkeys(found, 0.0)

    @model_validator(mode="after")
    def _something_is_learnt(self) -> DistillSection:
        if self.teacher is not None and not (self.weight or self.feature_weight):
            raise ValueError("weight and feature_weight are 0: nothing is learnt from the teacher")
        return self
