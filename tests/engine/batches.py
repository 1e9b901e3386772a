"""Batches of noise that are the same on any layout of ranks."""

from __future__ import annotations

import torch

BATCH = 16


def batch_of(step):
    """Images and tokens of all ranks."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (BATCH, 3, 48, 48), generator=generator, dtype=torch.uint8)
    tokens = torch.zeros(BATCH, 16, dtype=torch.long)
    for row in range(BATCH):  # uneven lengths, and a first rank with nothing to caption
        length = 1 if row < 4 else 3 + (row + step) % 13
        tokens[row, :length] = torch.randint(1, 1024, (length,), generator=generator)
    return images, tokens
