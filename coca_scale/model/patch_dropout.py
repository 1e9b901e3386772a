"""Patch dropout whose choice is a function of the sample, not of a random state."""

from __future__ import annotations

import torch
from torch import Tensor


def drop_patches(patches_BSD: Tensor, sample_ids: Tensor, fraction: float) -> Tensor:
    """Keep a random `1 − fraction` of the patches of each sample (FLIP, Li et al. 2023).

    The choice is a hash of `sample_ids` and the patch number. So it is the same in both passes of
    an accumulated step, on any number of ranks, and after a resume.

    Args:
        patches_BSD: patches with their positions, [B, S, D].
        sample_ids: int64 [B].
        fraction: share to drop, below 1; at least one patch is kept.

    Returns:
        [B, max(1, int(S·(1 − fraction))), D].
    """
    patches = patches_BSD.shape[1]
    kept = max(1, int(patches * (1 - fraction)))
    numbers = torch.arange(patches, device=sample_ids.device)
    scores = _mix(_mix(sample_ids)[:, None] + numbers)
    chosen_BK = scores.topk(kept, dim=1).indices
    return patches_BSD.gather(1, chosen_BK[:, :, None].expand(-1, -1, patches_BSD.shape[2]))


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014), in wrapping int64 arithmetic."""
    x = x + -0x61C8864680B583EB
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31)
