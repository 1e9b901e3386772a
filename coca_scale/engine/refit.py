"""Weights of a stage as the next one takes them: resized, or trained where they were locked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from coca_scale.engine.constants import read_constants
from coca_scale.engine.zero_slices import SavedState
from coca_scale.model import ModelConfig
from coca_scale.model.weights import fit_weight


def refitted(
    checkpoint: Path, weights: SavedState, shapes: Mapping[str, torch.Size], config: ModelConfig
) -> dict[str, Tensor]:
    """Those that a checkpoint did not train, or not in this shape.

    Args:
        checkpoint: its folder.
        weights: its own, or their average.
        shapes: of the weights that train now.
        config: of the model that they are of.

    Returns:
        fp32, by name. The others are in the shards as they are.

    Raises:
        UserError: a file is damaged, or holds something else.
    """
    constants, found = read_constants(checkpoint), {}
    for name, shape in shapes.items():
        if name not in constants and weights.shapes.get(name) == shape:
            continue
        old = constants[name] if name in constants else weights.whole(name)
        new = old if old.shape == shape else fit_weight(name, old, shape, config)
        assert new is not None, f"stages have no other {name} than of {tuple(shape)}"
        found[name] = new.float()
    return found
