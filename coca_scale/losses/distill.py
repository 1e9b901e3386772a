"""Distillation: a student's similarities and features drawn to those of a teacher.

With similarities z = s·I·Tᵀ of the student and y = τ·I'·T'ᵀ of the teacher, of the B samples of the
global batch, the loss of OpenCLIP's `DistillClipLoss` is the cross-entropy of one softmax under the
other, in both directions:

    L = 1/(2B) · Σ_ij [q_ij·(l_i2t[i] − z_ij) + r_ij·(l_t2i[j] − z_ij)]

where q is the softmax of y over texts, r that over images, and l are the log-sum-exps of z. As each
softmax sums to 1,

    L = 1/(2B) · [Σ_i (l_i2t[i] + l_t2i[i]) − Σ_ij (q_ij + r_ij)·z_ij]
    dL/dz = 1/(2B) · (softmax of z over texts + that over images − q − r)

and as in `contrastive.py` every rank writes the gradients of its own samples from gathered features
and two log-sum-exps per sample, here of both models: tiles of z and y exist, never all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from coca_scale.losses.contrastive import (
    ContrastiveResult,
    FeatureGather,
    all_gather,
    tile_of,
)
from coca_scale.losses.matmul import add_matmul_, wide_matmul

LABEL = "distillation loss"
FEATURES_LABEL = "distance to the teacher's features"


@torch.no_grad()
def distill_loss(
    gather: FeatureGather,
    log_scale: Tensor,
    teacher_log_scale: float,
    group: dist.ProcessGroup | None,
    chunk_rows: int | None = None,
) -> ContrastiveResult:
    """Cross-entropy of the student's similarities under the teacher's, with explicit gradients.

    All sums run in fp32, or in fp64 for fp64 features.

    Args:
        gather: the started all-gather of this step's features, with the teacher's.
        log_scale: ln s of the student, one element, fp32 or wider.
        teacher_log_scale: ln τ of the teacher.
        group: the ranks that share the batch, None for a single process.
        chunk_rows: as of `contrastive_loss`.
    """
    mine, taught = gather.features, gather.teacher
    assert taught is not None, "gathered without a teacher"
    wide = torch.promote_types(mine.dtype, torch.float32)
    ranks = dist.get_world_size(group) if group is not None else 1
    batch, width = ranks * len(mine), mine.shape[2]
    scale = log_scale.to(wide).exp().reshape(())
    teacher_scale = scale.new_full((), math.exp(teacher_log_scale))  # not a copy from the host
    grads = torch.zeros_like(mine, dtype=wide)
    tile = tile_of(chunk_rows, mine)
    sides = [
        _Side(_Model(mine[:, i], scale), _Model(taught[:, i], teacher_scale), grads[:, i], tile)
        for i in (0, 1)
    ]

    def first_pass(_: slice, pairs: Tensor) -> None:
        for side, keys in zip(sides, (pairs[:, 1], pairs[:, 0]), strict=True):
            side.add_to_logsumexps(keys[:, :width], keys[:, width:])

    gather.each_pair(first_pass, again=True)
    lse = torch.stack([side.lse for side in sides], dim=1)  # [n, 2 sides, 2 models]
    gathered = all_gather(lse, group)
    of_rank = gathered.unflatten(0, (ranks, -1))

    def second_pass(part: slice, pairs: Tensor) -> None:
        lses = of_rank[:, part].flatten(0, 1)
        for side, other in zip(sides, (1, 0), strict=True):
            keys = pairs[:, other]
            side.add_to_gradients(keys[:, :width], keys[:, width:], lses[:, other])

    gather.each_pair(second_pass, again=False)
    grads.mul_(scale / (2 * batch))
    crossed = sides[0].crossed + sides[1].crossed
    sums = torch.stack([(mine * grads).sum() / 2, crossed / (2 * batch)])
    if ranks > 1:
        dist.all_reduce(sums, group=group)
    return ContrastiveResult(gathered[:, :, 0].mean() - sums[1], grads, sums[0])


@torch.no_grad()
def feature_loss(gather: FeatureGather, group: dist.ProcessGroup | None) -> ContrastiveResult:
    """1 − cos of a student's unit features to the teacher's, the mean over images and texts.

    That is half the squared distance. Its gradient is that of a linear function: what a feature's
    length has to do with it, the normalisation in the model's graph takes out.

    Args:
        gather: of this step's features, with the teacher's, of as many elements.
        group: the ranks that share the batch, None for a single process.
    """
    mine, taught = gather.features, gather.teacher
    assert taught is not None and taught.shape == mine.shape
    wide = torch.promote_types(mine.dtype, torch.float32)
    ranks = dist.get_world_size(group) if group is not None else 1
    count = 2 * ranks * len(mine)
    loss = (1 - (mine.to(wide) * taught.to(wide)).sum(2)).sum() / count
    if ranks > 1:
        dist.all_reduce(loss, group=group)
    return ContrastiveResult(loss, taught.to(wide) / -count, loss.new_zeros(()))


@dataclass(frozen=True)
class _Model:
    """One of the two, as queries of a side: [n, d], and the scale of their products."""

    queries: Tensor
    scale: Tensor

    def products(self, rows: slice, keys: Tensor) -> Tensor:
        """scale·q_i·k_j [q, k], in the dtype of the scale."""
        return wide_matmul(self.queries[rows], keys.T, self.scale.dtype).mul_(self.scale)


class _Side:
    """This rank's images or texts as queries, and what is summed up over all keys.

    Attributes:
        lse: [n, 2], log Σ_j exp(scale·q_i·k_j) of student and teacher.
        crossed: Σ_ij q_ij·z_ij over this rank's queries, q the softmax of the teacher over keys.
    """

    def __init__(
        self, student: _Model, teacher: _Model, grads: Tensor, tile: tuple[int, int]
    ) -> None:
        self._models, self._grads = (student, teacher), grads
        step, self._keys = tile
        rows = range(0, len(grads), step)
        self._chunks = [slice(start, start + step) for start in rows]
        self.lse = grads.new_full((len(grads), 2), -torch.inf)
        self.crossed = grads.new_zeros(())

    def add_to_logsumexps(self, *keys: Tensor) -> None:
        """First pass, once for all keys [m, d] of the student and [m, t] of the teacher."""
        for number, (model, of_it) in enumerate(zip(self._models, keys, strict=True)):
            for tile in of_it.split(self._keys):
                for rows in self._chunks:
                    found = model.products(rows, tile).logsumexp(1)
                    self.lse[rows, number] = torch.logaddexp(self.lse[rows, number], found)

    def add_to_gradients(self, student: Tensor, teacher: Tensor, key_lse: Tensor) -> None:
        """Second pass: Σ_j (p_ij + p_ji − q_ij − q_ji)·k_j, softmaxes of student and teacher.

        Args:
            student: keys [m, d].
            teacher: keys [m, t].
            key_lse: [m, 2], their log-sum-exps as queries.
        """
        split = (of.split(self._keys) for of in (student, teacher, key_lse))
        for keys, taught, lse in zip(*split, strict=True):
            for rows in self._chunks:
                mine = self._models[0].products(rows, keys)
                theirs = self._models[1].products(rows, taught)
                softmax = (theirs - self.lse[rows, 1:]).exp_()
                self.crossed += (softmax * mine).sum()
                weights = softmax.add_(theirs.sub_(lse[:, 1]).exp_()).neg_()
                weights += (mine - self.lse[rows, :1]).exp_()
                weights += mine.sub_(lse[:, 0]).exp_()
                add_matmul_(self._grads[rows], weights, keys)
