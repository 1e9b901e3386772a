"""The losses, as functions of tensors and a process group.

A recipe weighs each by `loss.NAME_weight`, and a run's metrics have it as `NAME_loss`.
"""

from coca_scale.losses.caption import LABEL as CAPTION
from coca_scale.losses.caption import chunked_cross_entropy
from coca_scale.losses.contrastive import LABEL as CONTRASTIVE
from coca_scale.losses.contrastive import ContrastiveResult, FeatureGather, contrastive_loss

LABELS = {"contrastive": CONTRASTIVE, "caption": CAPTION}  # as people call them, by name

__all__ = [
    "LABELS",
    "ContrastiveResult",
    "FeatureGather",
    "chunked_cross_entropy",
    "contrastive_loss",
]
