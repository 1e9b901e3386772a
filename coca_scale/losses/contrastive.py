"""The contrastive loss over the global batch, with one feature collective and exact gradients.

With B samples over W ranks, z = s·I·Tᵀ and row log-sum-exps l, the loss is

    L = 1/(2B) · Σ_i (l_i2t[i] + l_t2i[i] − 2 z[i, i])

Every rank gathers all features once, computes the log-sum-exps of its own rows, gathers those (two
numbers per sample) and can then write dL/dI and dL/dT of its own rows: no gradient of features
travels. Neither the [B, B] matrix nor a [B/W, B] slab of it exists, only tiles of some queries ×
some keys. Of the size of the global batch there are the gathered features alone, in the dtype that
the model computes in; where even those are too many, they are gathered in pieces, once for the
log-sum-exps and once for the gradients, each while the one before is used.

As s·I occurs in z and I nowhere else, dL/d ln s = Σ_i ⟨I_i, dL/dI_i⟩, and the same of T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from coca_scale.losses.matmul import add_matmul_, wide_matmul

LABEL = "contrastive loss"
# queries × keys of a tile; one of GPU_TILE similarities is work for all cores of a GPU, which then
# finds some of it in its cache again
CHUNK_ROWS, KEY_ROWS = 512, 8192
GPU_ROWS, GPU_TILE = 4096, 2**23


@dataclass(frozen=True)
class ContrastiveResult:
    """Loss of the global batch and its gradients.

    Attributes:
        loss: scalar, the same on every rank.
        grad_features: [n, 2, d], dL/d(image, text) of this rank's samples.
        grad_log_scale: scalar, dL/d ln s, summed over ranks: the same on every rank.
        grad_bias: scalar, likewise; None of a loss without a bias.
    """

    loss: Tensor
    grad_features: Tensor
    grad_log_scale: Tensor
    grad_bias: Tensor | None = None


class FeatureGather:
    """An all-gather of packed features that runs while other work goes on.

    Args:
        features: packed features [n, 2, d] of this rank, detached; the same n on every rank.
        group: process group, None for a single process. Where other collectives run meanwhile,
            give it a group of its own.
        resident: samples whose gathered features may exist at a time; None for any number. More
            are gathered in pieces, as often as they are asked for.
        teacher: another model's features [n, 2, t] of the same samples, which travel with them.
    """

    def __init__(
        self,
        features: Tensor,
        group: dist.ProcessGroup | None,
        resident: int | None = None,
        teacher: Tensor | None = None,
    ) -> None:
        self.features = features.contiguous()
        self.teacher = None if teacher is None else teacher.to(features.dtype)
        both = [self.features] if self.teacher is None else [self.features, self.teacher]
        self._sent = torch.cat(both, dim=2) if len(both) > 1 else self.features
        self._group = group
        self._ranks = dist.get_world_size(group) if group is not None else 1
        local = len(features)
        rows = local
        if self._ranks > 1 and resident is not None and local * self._ranks > resident:
            rows = max(1, resident // (2 * self._ranks))  # one is used while the next one travels
        self._parts = [slice(i, min(i + rows, local)) for i in range(0, local, rows)]
        self._next: tuple[Tensor, dist.Work | None] | None = self._start(0)

    def each(self, use: Callable[[slice, Tensor], None], again: bool) -> None:
        """Call `use` for all features, once.

        Args:
            use: given a part of every rank's samples, and their features [W·k, 2, d] in rank order.
            again: whether they will be asked for once more, so that the first piece can travel
                meanwhile; without it they can be all the same.
        """
        width = self.features.shape[2]
        self.each_pair(lambda part, pairs: use(part, pairs[:, :, :width]), again)

    def each_pair(self, use: Callable[[slice, Tensor], None], again: bool) -> None:
        """As `each`, of features with the teacher's behind them, [W·k, 2, d + t]."""
        for number, part in enumerate(self._parts, 1):
            gathered, work = self._next or self._start(0)
            if work is not None:
                work.wait()
            self._next = gathered, None
            if len(self._parts) > 1:
                last = number == len(self._parts) and not again
                self._next = None if last else self._start(number % len(self._parts))
            use(part, gathered)

    def _start(self, number: int) -> tuple[Tensor, dist.Work | None]:
        mine = self._sent[self._parts[number]]
        if self._ranks == 1:
            return mine, None
        gathered = mine.new_empty((self._ranks * mine.shape[0], *mine.shape[1:]))
        work = dist.all_gather_into_tensor(gathered, mine, group=self._group, async_op=True)
        return gathered, work


@torch.no_grad()
def contrastive_loss(
    gather: FeatureGather,
    log_scale: Tensor,
    group: dist.ProcessGroup | None,
    chunk_rows: int | None = None,
) -> ContrastiveResult:
    """Contrastive loss (Radford et al. 2021, eq. in figure 3) with explicit gradients.

    All sums run in fp32, or in fp64 for fp64 features.

    Args:
        gather: the started all-gather of this step's features.
        log_scale: ln s, one element, fp32 or wider.
        group: the ranks that share the batch, None for a single process.
        chunk_rows: rows of the similarity matrix that exist at a time, KEY_ROWS columns of each;
            None for tiles that suit the device.
    """
    mine = gather.features
    wide = torch.promote_types(mine.dtype, torch.float32)
    ranks = dist.get_world_size(group) if group is not None else 1
    batch = ranks * len(mine)
    scale = log_scale.to(wide).exp().reshape(())
    grads = torch.zeros_like(mine, dtype=wide)
    tile = tile_of(chunk_rows, mine)
    sides = [_Side(mine[:, i], grads[:, i], scale, tile) for i in (0, 1)]

    def first_pass(_: slice, features: Tensor) -> None:
        for side, keys in zip(sides, both(features, 1), strict=True):
            side.add_to_logsumexp(keys)

    gather.each(first_pass, again=True)
    lse = torch.stack([side.lse for side in sides], dim=1)
    diagonal = scale * (mine[:, 0].to(wide) * mine[:, 1].to(wide)).sum(1)
    gathered = all_gather(torch.cat([lse, diagonal[:, None]], dim=1), group)
    loss = (gathered[:, :2].mean(1) - gathered[:, 2]).mean()

    of_rank = gathered.unflatten(0, (ranks, -1))

    def second_pass(part: slice, features: Tensor) -> None:
        lses = both(of_rank[:, part, :2].flatten(0, 1), 1)
        for side, keys, key_lse in zip(sides, both(features, 1), lses, strict=True):
            side.add_to_gradients(keys, key_lse)

    gather.each(second_pass, again=False)
    # each pair is its own positive, counted once per direction
    grads.sub_(mine.flip(1), alpha=2).mul_(scale / (2 * batch))
    grad_log_scale = (mine * grads).sum() / 2
    if ranks > 1:
        dist.all_reduce(grad_log_scale, group=group)
    return ContrastiveResult(loss, grads, grad_log_scale)


class _Side:
    """This rank's image or text features as queries, and what is summed up over all keys.

    Attributes:
        lse: [n], log Σ_j exp(s·q_i·k_j).
    """

    def __init__(
        self, queries: Tensor, grads: Tensor, scale: Tensor, tile: tuple[int, int]
    ) -> None:
        self._queries, self._grads, self._scale = queries, grads, scale
        step, self._keys = tile
        rows = range(0, len(queries), step)
        self._chunks = [slice(start, start + step) for start in rows]
        self.lse = scale.new_full((len(queries),), -torch.inf)

    def add_to_logsumexp(self, keys: Tensor) -> None:
        """First pass, once for all keys [m, d]."""
        for tile in keys.split(self._keys):
            for rows in self._chunks:
                products = self._products(rows, tile)
                largest = products.amax(1).mul_(self._scale)
                found = self._exp(products, largest[:, None], products).sum(1).log_().add_(largest)
                self.lse[rows] = torch.logaddexp(self.lse[rows], found)

    def add_to_gradients(self, keys: Tensor, key_lse: Tensor) -> None:
        """Second pass: Σ_j (p_ij + p_ji)·k_j, the softmax over keys and over queries.

        Args:
            keys: [m, d].
            key_lse: [m], their log-sum-exps as queries.
        """
        tiles = zip(keys.split(self._keys), key_lse.split(self._keys), strict=True)
        for tile, tile_lse in tiles:
            for rows in self._chunks:
                products = self._products(rows, tile)
                weights = self._exp(products, self.lse[rows, None], torch.empty_like(products))
                weights += self._exp(products, tile_lse, products)
                add_matmul_(self._grads[rows], weights, tile)

    def _products(self, rows: slice, keys: Tensor) -> Tensor:
        """q_i·k_j, [q, k] in the dtype of s: rounded to bf16, s times them would be off by 10 %."""
        return wide_matmul(self._queries[rows], keys.T, self._scale.dtype)

    def _exp(self, products: Tensor, shift: Tensor, out: Tensor) -> Tensor:
        """exp(s·products − shift) in `out`, in two passes."""
        return torch.addcmul(-shift, products, self._scale, out=out).exp_()


def tile_of(chunk_rows: int | None, queries: Tensor) -> tuple[int, int]:
    """Queries and keys of a tile; tensors without data stand for a GPU's."""
    if chunk_rows is None and queries.device.type != "cpu":
        rows = min(len(queries), GPU_ROWS)
        return rows, GPU_TILE // rows
    return chunk_rows or CHUNK_ROWS, KEY_ROWS


def both(pairs: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The two columns of [m, 2, …], the one with index `first` first."""
    return pairs[:, first], pairs[:, 1 - first]


def all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Rows of all ranks, in rank order. A collective."""
    if group is None or dist.get_world_size(group) == 1:
        return x
    out = x.new_empty((dist.get_world_size(group) * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out
