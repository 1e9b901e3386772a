"""The file of a checkpoint with the replicated scale of logits, and how its other state is cut."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, InstanceOf
from torch import Tensor

from coca_scale.engine.optimizer import ADAMW
from coca_scale.engine.zero_files import Layout
from coca_scale.model.pickles import read_pickle
from coca_scale.recipe.files import validated

SCALE_FILE = "logit_scale.pt"


@dataclass(frozen=True)
class ScaleState:
    """What is in the file.

    Attributes:
        model: of the `LogitScale`, as its `state_dict`.
        optimizer: of its optimizer, likewise.
        ranks: that wrote the checkpoint.
        zero_stage: at which they did.
        optimizer_kind: name of the `OptimizerKind`.
        updates: of the optimizer so far; None where a checkpoint has no count of its own.
    """

    model: Annotated[dict[str, InstanceOf[Tensor]], Field(min_length=1)]
    optimizer: dict[str, Any]
    ranks: Annotated[int, Field(ge=1)]
    zero_stage: Literal[0, 1, 2, 3]
    optimizer_kind: str = ADAMW.name
    updates: Annotated[int, Field(ge=0)] | None = None

    @property
    def layout(self) -> Layout:
        """How the rest of the checkpoint is cut."""
        return Layout(self.ranks, self.zero_stage)

    @property
    def steps(self) -> int:
        """Updates of the optimizer so far."""
        if self.updates is not None:
            return self.updates
        return max((int(entry["step"]) for entry in self.optimizer["state"].values()), default=0)


def read_scale(folder: Path, place: str | torch.device = "cpu") -> ScaleState:
    """Of a checkpoint.

    Raises:
        UserError: damaged, or holding something else.
    """
    file = folder / SCALE_FILE
    return validated(read_pickle(file, place=place), ScaleState, str(file))
