"""The two losses of CoCa, as functions of tensors and a process group."""

from coca_scale.losses.caption import chunked_cross_entropy
from coca_scale.losses.contrastive import (
    ContrastiveResult,
    FeatureGather,
    contrastive_loss,
)

__all__ = ["ContrastiveResult", "FeatureGather", "chunked_cross_entropy", "contrastive_loss"]
