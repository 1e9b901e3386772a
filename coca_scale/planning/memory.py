"""Bytes of weights, gradients and optimizer state under ZeRO (Rajbhandari et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass

ADAM_BYTES = 8  # two moments in fp32
MASTER_BYTES = 4
AVERAGE_BYTES = 4


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Of all three."""
        return self.parameters + self.gradients + self.optimizer


def state_bytes(
    parameters: int, trained: int, ranks: int, zero_stage: int, precision: str, averaged: bool
) -> StateBytes:
    """Bytes per rank, without activations and without what is gathered for a layer at a time.

    Args:
        parameters: of the model.
        trained: of them, those that are not locked.
        ranks: processes that share the state.
        zero_stage: 0 to 3.
        precision: fp32, bf16 or fp16.
        averaged: whether a moving average of the weights is kept.
    """
    element = 4 if precision == "fp32" else 2
    master = 0 if precision == "fp32" else MASTER_BYTES
    weights = parameters * element
    gradients = trained * element
    optimizer = trained * (ADAM_BYTES + master + (AVERAGE_BYTES if averaged else 0))
    return StateBytes(
        round(weights / (ranks if zero_stage >= 3 else 1)),
        round(gradients / (ranks if zero_stage >= 2 else 1)),
        round(optimizer / (ranks if zero_stage >= 1 else 1)),
    )
