"""The keys of a recipe that say how weights are updated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from coca_scale.recipe.section import Section


class OptimSection(Section):
    """The optimizer."""

    @field_validator("name", mode="before")
    @classmethod
    def _no_muon(cls, name: object) -> object:
        if isinstance(name, str) and name.lower() == "muon":
            raise ValueError(
                "muon is not offered: with DeepSpeed's a run goes on with the same ranks and ZeRO "
                "stage only, and not at stage 3; take adamw"
            )
        return name

    name: Literal["adamw", "nadamw"] = Field(
        "adamw",
        description="adamw; or timm's nadamw, whose momentum looks ahead as Nesterov's, and with "
        "which the host waits for the GPU in every step.",
    )
    lr: Annotated[float, Field(gt=0.0)] = Field(description="Peak learning rate.")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        0.1, description="On matrices only: norms, biases, embedding vectors are not decayed."
    )
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.9, description="Decay of the momentum."
    )
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.98, description="Decay of squares.")
    eps: Annotated[float, Field(gt=0.0)] = Field(1e-6, description="Epsilon.")
    clip_norm: Annotated[float, Field(ge=0.0)] = Field(
        1.0, description="Largest global gradient norm; 0 turns clipping off."
    )
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0,
        description="Factor on the learning rate per layer group below the top of each tower "
        "and of the decoder.",
    )
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None,
        description="Keep an exponential moving average of the weights, and export it; the decay "
        "of step n is min(ema_decay, (1 + n) / (10 + n)).",
    )
