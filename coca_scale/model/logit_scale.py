"""What makes logits of cosine similarities: a learned temperature, for some losses a bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from coca_scale.model.config import ModelConfig

MAX_LOG_SCALE = math.log(100.0)
INITIAL_LOG_SCALE = -math.log(0.07)


class LogitScale(nn.Module):
    """Log of the factor on cosine similarities, kept in [0, ln 100], and the bias beside it: fp32.

    It stands apart from the towers because it must stay in fp32 and unsharded: bf16 would move it
    in steps of 3 % near 100, and its gradient is written by the loss itself.

    Attributes:
        log_scale: [1].
        bias: [1], added to what is scaled; None in a model that has none.
    """

    def __init__(
        self, initial_log_scale: float = INITIAL_LOG_SCALE, initial_bias: float | None = None
    ) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((1,), initial_log_scale))
        bias = None if initial_bias is None else torch.full((1,), initial_bias)
        self.bias = None if bias is None else nn.Parameter(bias)

    @classmethod
    def of(cls, config: ModelConfig) -> LogitScale:
        """That of a model, as its training begins."""
        scale = config.init_logit_scale
        return cls(INITIAL_LOG_SCALE if scale is None else scale, config.init_logit_bias)

    def clamp_(self) -> None:
        """Return the scale to [0, ln 100] after an update, in place.

        With the sigmoid loss, too, as OpenCLIP does and SigLIP's authors do not: a model trains on
        in either program as it did before.
        """
        with torch.no_grad():
            self.log_scale.clamp_(0.0, MAX_LOG_SCALE)

    def forward(self) -> Tensor:
        """exp of the parameter, shape [1]."""
        return self.log_scale.exp()
