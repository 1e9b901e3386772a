"""The losses, as functions of tensors and a process group.

A recipe weighs each by `loss.NAME_weight`, and a run's metrics have it as `NAME_loss`.
"""

from coca_scale.losses.caption import LABEL as CAPTION
from coca_scale.losses.caption import chunked_cross_entropy
from coca_scale.losses.contrastive import LABEL as CONTRASTIVE
from coca_scale.losses.contrastive import ContrastiveResult, FeatureGather, contrastive_loss
from coca_scale.losses.distill import FEATURES_LABEL as DISTILL_FEATURES
from coca_scale.losses.distill import LABEL as DISTILL
from coca_scale.losses.distill import distill_loss, feature_loss
from coca_scale.losses.sigmoid import sigmoid_loss

# as people call them, by name; the first kind sees features and trains what makes them, the second
# is a sum over tokens and trains the decoder
OF_A_TEACHER = {"distill": DISTILL, "distill_features": DISTILL_FEATURES}
OF_FEATURES = {"contrastive": CONTRASTIVE, **OF_A_TEACHER}
OF_CAPTIONS = {"caption": CAPTION}
LABELS = {**OF_FEATURES, **OF_CAPTIONS}

__all__ = [
    "LABELS",
    "OF_A_TEACHER",
    "OF_CAPTIONS",
    "OF_FEATURES",
    "ContrastiveResult",
    "FeatureGather",
    "chunked_cross_entropy",
    "contrastive_loss",
    "distill_loss",
    "feature_loss",
    "sigmoid_loss",
]
