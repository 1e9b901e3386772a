"""The sigmoid loss over the global batch (Zhai et al. 2023, arXiv:2303.15343), as SigLIP trains.

With B samples over W ranks, z = s·I·Tᵀ + b, y = 1 on the diagonal and −1 elsewhere, the loss is

    L = −1/B · Σ_ij log σ(y_ij · z_ij)

A pair's gradient depends on no other pair, so that one pass over the gathered features is all:
dL/dI_i = s/B · Σ_j (σ(z_ij) − [i = j])·T_j, and the same of T. What a rank sums up is of its own
rows; of the whole batch there are three sums of scalars. Tiles, pieces and widths are those of
contrastive.py.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from coca_scale.losses.contrastive import ContrastiveResult, FeatureGather, both, tile_of
from coca_scale.losses.matmul import add_matmul_, wide_matmul

_LINEAR_FROM = 60.0  # exp of it is finite in fp32, and log(1 + exp(-60)) nothing in fp64


@torch.no_grad()
def sigmoid_loss(
    gather: FeatureGather,
    log_scale: Tensor,
    bias: Tensor,
    group: dist.ProcessGroup | None,
    chunk_rows: int | None = None,
) -> ContrastiveResult:
    """Sigmoid loss with explicit gradients, that of the bias among them.

    All sums run in fp32, or in fp64 for fp64 features.

    Args:
        gather: the started all-gather of this step's features.
        log_scale: ln s, one element, fp32 or wider.
        bias: b, likewise.
        group: the ranks that share the batch, None for a single process.
        chunk_rows: as of `contrastive_loss`.
    """
    mine = gather.features
    wide = torch.promote_types(mine.dtype, torch.float32)
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    batch = ranks * len(mine)
    scale, shift = log_scale.to(wide).exp().reshape(()), bias.to(wide).reshape(())
    grads = torch.zeros_like(mine, dtype=wide)
    tile = tile_of(chunk_rows, mine)
    sides = [_Side(mine[:, i], grads[:, i], scale, shift, tile) for i in (0, 1)]

    def only_pass(part: slice, features: Tensor) -> None:
        own = rank * len(features) // ranks  # where this rank's samples of the part begin
        for side, keys in zip(sides, both(features, 1), strict=True):
            side.add_unlike(keys, part, own)

    gather.each(only_pass, again=False)
    like = scale * (mine[:, 0].to(wide) * mine[:, 1].to(wide)).sum(1) + shift
    missing = (-like).sigmoid()
    loss = sides[0].loss + _softplus(-like).sum()
    grad_bias = sides[0].probability - missing.sum()
    grads.sub_(mine.flip(1) * missing[:, None, None]).mul_(scale / batch)
    sums = torch.stack([loss / batch, grad_bias / batch, (mine * grads).sum() / 2])
    if ranks > 1:
        dist.all_reduce(sums, group=group)
    return ContrastiveResult(sums[0], grads, sums[2], sums[1])


class _Side:
    """This rank's image or text features as queries, and what is summed up over all other pairs.

    Attributes:
        loss: Σ log(1 + exp z_ij) over this rank's i and all j ≠ i.
        probability: Σ σ(z_ij), likewise.
    """

    def __init__(
        self, queries: Tensor, grads: Tensor, scale: Tensor, bias: Tensor, tile: tuple[int, int]
    ) -> None:
        self._queries, self._grads, self._scale, self._bias = queries, grads, scale, bias
        self._rows, self._keys = tile
        self.loss = torch.zeros_like(scale, dtype=torch.float64)
        self.probability = torch.zeros_like(self.loss)

    def add_unlike(self, keys: Tensor, part: slice, own: int) -> None:
        """Take in keys, each as what is not the pair of a query.

        Args:
            keys: [m, d].
            part: of the queries, whose own keys are among these.
            own: index of the first of those.
        """
        for first in range(0, len(keys), self._keys):
            tile = keys[first : first + self._keys]
            for start in range(0, len(self._queries), self._rows):
                rows = slice(start, min(start + self._rows, len(self._queries)))
                logits = wide_matmul(self._queries[rows], tile.T, self._scale.dtype)
                logits.mul_(self._scale).add_(self._bias)
                begin, end = max(start, part.start), min(rows.stop, part.stop)
                if begin < end:  # pairs: exp(-inf) adds nothing
                    column = own + begin - part.start - first
                    logits[begin - start : end - start].diagonal(column).fill_(-torch.inf)
                self.loss += _softplus(logits).sum()
                weights = logits.sigmoid_()
                self.probability += weights.sum()
                add_matmul_(self._grads[rows], weights, tile)


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=_LINEAR_FROM)
