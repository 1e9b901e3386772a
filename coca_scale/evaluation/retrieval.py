"""Image-text retrieval."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def recall_at_1(
    image_features: Tensor, text_features: Tensor, captions: Sequence[str]
) -> tuple[float, float]:
    """Share of queries whose nearest neighbour carries the right caption.

    Any sample with an equal caption counts as right, so repeated captions are no faults.

    Args:
        image_features: [n, d], unit length.
        text_features: [n, d], unit length.
        captions: of the n pairs.

    Returns:
        Image to text, and text to image.
    """
    ids = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    label = torch.tensor([ids[caption] for caption in captions], device=image_features.device)
    hits = []
    for queries, keys in ((image_features, text_features), (text_features, image_features)):
        found = torch.cat([(chunk @ keys.T).argmax(1) for chunk in queries.split(1024)])
        hits.append(float((label[found] == label).float().mean()))
    return hits[0], hits[1]
