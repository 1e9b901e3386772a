"""The learned temperature of the contrastive loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MAX_LOG_SCALE = math.log(100.0)


class LogitScale(nn.Module):
    """Log of the factor on cosine similarities: one fp32 number, kept in [0, ln 100].

    It stands apart from the towers because it must stay in fp32 and unsharded: bf16 would move it
    in steps of 3 % near 100, and its gradient is written by the loss itself.
    """

    def __init__(self, initial_temperature: float = 0.07) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((1,), -math.log(initial_temperature)))

    def clamp_(self) -> None:
        """Return to [0, ln 100] after an update, in place."""
        with torch.no_grad():
            self.log_scale.clamp_(0.0, MAX_LOG_SCALE)

    def forward(self) -> Tensor:
        """exp of the parameter, shape [1]."""
        return self.log_scale.exp()
