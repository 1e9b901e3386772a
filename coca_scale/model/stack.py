"""Run a stack of blocks, with or without activation checkpointing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coca_scale.model.recompute import Recomputable


def run_block(block: Recomputable, x: Tensor, *args: Any) -> Tensor:
    """Apply one block; if it is to be recomputed, keep only its input for the backward pass.

    Non-reentrant with early stop: the other kinds fail or lose gradients under ZeRO-3.
    """
    if block.recompute:
        return checkpoint(block, x, *args, use_reentrant=False, preserve_rng_state=False)
    return block(x, *args)


def run_blocks(blocks: nn.ModuleList, x: Tensor, *args: Any) -> Tensor:
    """Apply blocks one after the other, [B, T, D] → [B, T, D]."""
    for block in blocks:
        assert isinstance(block, Recomputable)
        x = run_block(block, x, *args)
    return x
