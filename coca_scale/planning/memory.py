"""Bytes of weights, gradients and optimizer state under ZeRO (Rajbhandari et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass

from coca_scale.engine.optimizer import kind_of
from coca_scale.recipe import Recipe

MOMENT_BYTES = 4
MASTER_BYTES = 4
AVERAGE_BYTES = 4


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one rank: three kinds on its device, and what waits in the memory of the host."""

    parameters: int
    gradients: int
    optimizer: int
    host: int

    @property
    def total(self) -> int:
        """On the device."""
        return self.parameters + self.gradients + self.optimizer


def state_bytes(
    recipe: Recipe, parameters: int, trained: int, ranks: int, ranks_per_node: int
) -> StateBytes:
    """Bytes per rank, without activations and without what is gathered for a layer at a time.

    Args:
        recipe: says how the state is cut, and in which precision it is.
        parameters: of the model.
        trained: of them, those that are not locked.
        ranks: processes that share the state.
        ranks_per_node: of them on one node.
    """
    engine = recipe.engine
    element = 4 if engine.precision == "fp32" else 2
    moments = MOMENT_BYTES * len(kind_of(recipe.optim).moments)
    moments += 0 if engine.precision == "fp32" else MASTER_BYTES
    moments += 0 if recipe.optim.ema_decay is None else AVERAGE_BYTES
    stage = engine.zero_stage
    weights = parameters * element / (ranks if stage >= 3 else 1)
    gradients = trained * element / (ranks if stage >= 2 else 1)
    optimizer = trained * moments / (ranks if stage >= 1 else 1)
    host = 0.0
    if engine.offload != "none":
        host += gradients + optimizer
        gradients = optimizer = 0.0
    if engine.offload == "all":
        host += weights
        weights = 0.0
    if engine.secondary_shard and ranks > ranks_per_node:
        weights += parameters * element / ranks_per_node
    return StateBytes(round(weights), round(gradients), round(optimizer), round(host))
