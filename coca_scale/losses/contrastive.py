"""The contrastive loss over the global batch, with one feature collective and exact gradients.

With B samples over W ranks, z = s·I·Tᵀ and row log-sum-exps l, the loss is

    L = 1/(2B) · Σ_i (l_i2t[i] + l_t2i[i] − 2 z[i, i])

Every rank gathers all features once, computes the log-sum-exps of its own rows, gathers those (two
numbers per sample) and can then write dL/dI and dL/dT of its own rows: no gradient of features
travels. Neither the [B, B] matrix nor a [B/W, B] slab of it exists, only tiles of `chunk_rows`
queries × KEY_ROWS keys. Of the size of the global batch there are the gathered features alone, in
the dtype that the model computes in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from coca_scale.losses.matmul import wide_matmul

KEY_ROWS = 8192


@dataclass(frozen=True)
class ContrastiveResult:
    """Loss of the global batch and its gradients.

    Attributes:
        loss: scalar, the same on every rank.
        grad_features: [n, 2, d], dL/d(image, text) of this rank's samples.
        grad_log_scale: scalar, dL/d ln s, summed over ranks: the same on every rank.
    """

    loss: Tensor
    grad_features: Tensor
    grad_log_scale: Tensor


class FeatureGather:
    """An all-gather of packed features that runs while other work goes on.

    Args:
        features: packed features [n, 2, d] of this rank, detached; the same n on every rank.
        group: process group, None for a single process. Where other collectives run meanwhile,
            give it a group of its own.
    """

    def __init__(self, features: Tensor, group: dist.ProcessGroup | None) -> None:
        self._work: dist.Work | None = None
        self._features = features.contiguous()
        self._gathered = self._features
        if group is not None and dist.get_world_size(group) > 1:
            shape = (dist.get_world_size(group) * features.shape[0], *features.shape[1:])
            self._gathered = features.new_empty(shape)
            self._work = dist.all_gather_into_tensor(
                self._gathered, self._features, group=group, async_op=True
            )

    def wait(self) -> Tensor:
        """Features of all ranks, [W·n, 2, d], in rank order."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._gathered


@torch.no_grad()
def contrastive_loss(
    gather: FeatureGather,
    log_scale: Tensor,
    group: dist.ProcessGroup | None,
    chunk_rows: int,
) -> ContrastiveResult:
    """Contrastive loss (Radford et al. 2021, eq. in figure 3) with explicit gradients.

    All sums run in fp32, or in fp64 for fp64 features.

    Args:
        gather: the started all-gather of this step's features.
        log_scale: ln s, one element, fp32 or wider.
        group: the ranks that share the batch, None for a single process.
        chunk_rows: rows of the similarity matrix that exist at a time.
    """
    gathered = gather.wait()
    wide = torch.promote_types(gathered.dtype, torch.float32)
    images, texts = gathered[:, 0], gathered[:, 1]
    batch = len(gathered)
    ranks = dist.get_world_size(group) if group is not None else 1
    local = batch // ranks
    first = local * dist.get_rank(group) if group is not None else 0
    mine = slice(first, first + local)
    scale = log_scale.to(wide).exp().reshape(())

    lse = torch.stack(
        [
            _row_logsumexp(images[mine], texts, scale, chunk_rows),
            _row_logsumexp(texts[mine], images, scale, chunk_rows),
        ],
        dim=1,
    )
    diagonal = scale * (images[mine].to(wide) * texts[mine].to(wide)).sum(1)
    gathered_rows = _all_gather(torch.cat([lse, diagonal[:, None]], dim=1), group)
    lse_all, diagonal_all = gathered_rows[:, :2], gathered_rows[:, 2]
    loss = (lse_all.mean(1) - diagonal_all).mean()

    sides = (images, texts, lse_all), (texts, images, lse_all.flip(1))
    (grad_images, moment_i2t), (grad_texts, moment_t2i) = (
        _row_gradients(queries, keys, lses, mine, scale, chunk_rows)
        for queries, keys, lses in sides
    )
    grad_log_scale = (moment_i2t + moment_t2i - 2 * diagonal.sum()) / (2 * batch)
    if ranks > 1:
        dist.all_reduce(grad_log_scale, group=group)
    grad_features = torch.stack([grad_images, grad_texts], dim=1)
    return ContrastiveResult(loss, grad_features, grad_log_scale)


def _row_logsumexp(queries: Tensor, keys: Tensor, scale: Tensor, chunk_rows: int) -> Tensor:
    """log Σ_j exp(s·q_i·k_j) for every query, [n]."""
    return torch.cat(
        [
            torch.stack(
                [_scores(q, k, scale).logsumexp(1) for k in keys.split(KEY_ROWS)]
            ).logsumexp(0)
            for q in queries.split(chunk_rows)
        ]
    )


def _row_gradients(
    queries: Tensor, keys: Tensor, lse: Tensor, mine: slice, scale: Tensor, chunk_rows: int
) -> tuple[Tensor, Tensor]:
    """Gradient of the loss for this rank's queries, and Σ_ij p_ij·z_ij over its rows.

    Args:
        queries: [B, d] of the side whose gradient is wanted.
        keys: [B, d] of the other side.
        lse: [B, 2], log-sum-exp per query row and per key row.
        mine: this rank's rows.
        scale: s.
        chunk_rows: queries at a time.

    Returns:
        [n, d] and a scalar, in the dtype of `lse`.
    """
    batch, width = queries.shape
    grads = lse.new_zeros(mine.stop - mine.start, width)
    moment = lse.new_zeros(())
    for start in range(mine.start, mine.stop, chunk_rows):
        rows = slice(start, min(start + chunk_rows, mine.stop))
        grad = grads[rows.start - mine.start : rows.stop - mine.start]
        for key_start in range(0, batch, KEY_ROWS):
            columns = slice(key_start, key_start + KEY_ROWS)
            scores = _scores(queries[rows], keys[columns], scale)
            weights = (scores - lse[rows, :1]).exp()
            moment += (weights * scores).sum()
            weights += scores.sub_(lse[columns, 1]).exp_()
            grad.addmm_(weights, keys[columns].to(weights.dtype))
        grad -= 2 * keys[rows]
    return grads.mul_(scale / (2 * batch)), moment


def _scores(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    """s·q_i·k_j, [q, k] in the dtype of `scale`: rounded to bf16 it would be off by 10 %."""
    return wide_matmul(queries, keys.T, scale.dtype).mul_(scale)


def _all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None or dist.get_world_size(group) == 1:
        return x
    out = x.new_empty((dist.get_world_size(group) * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out
