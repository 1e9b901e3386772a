"""Order of a rank's share of a step that gives its micro-batches equally many tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def balanced_order(lengths: Tensor, micro_batch: int) -> Tensor:
    """A permutation after which every `micro_batch` samples in a row have about as many tokens.

    The longest are dealt first, back and forth over the micro-batches, so totals differ by no more
    than the longest caption. Samples stay in their rank and step, so the loss is the same.

    Args:
        lengths: int [n], tokens of each caption.
        micro_batch: samples per micro-batch, a divisor of n.

    Returns:
        int64 [n], stable for equal lengths.
    """
    count = len(lengths) // micro_batch
    assert count * micro_batch == len(lengths), "a share of another size than planned"
    rows = lengths.argsort(descending=True, stable=True).view(micro_batch, count)
    turned = torch.where(torch.arange(micro_batch)[:, None] % 2 == 1, rows.flip(1), rows)
    return turned.T.reshape(-1)
