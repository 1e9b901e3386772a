"""Run a stack of blocks, with or without activation checkpointing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, x: Tensor, recompute: bool, *args: Any) -> Tensor:
    """Apply one block; with `recompute`, keep only its input for the backward pass.

    Non-reentrant with early stop: the other kinds fail or lose gradients under ZeRO-3.
    """
    if recompute:
        return checkpoint(block, x, *args, use_reentrant=False, preserve_rng_state=False)
    return block(x, *args)


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, recompute: bool, *args: Any) -> Tensor:
    """Apply blocks one after the other, [B, T, D] → [B, T, D]."""
    for block in blocks:
        x = run_block(block, x, recompute, *args)
    return x
