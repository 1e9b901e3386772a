"""Captions of several lengths without their padding.

Linear layers, norms and MLPs run over the rows of all captions, one after the other, [N, D], and
so does attention on GPUs (varlen.py). Elsewhere rows are laid out for it as [B, L, D], L the
longest caption of the batch. Padding comes after all real tokens and every tower is causal, so the
outputs of real tokens do not change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Move = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Packing:
    """Sequences of several lengths, stored row after row.

    Attributes:
        batch: sequences B.
        longest: rows L of the longest one.
        indices: int64 [N], the index in [B·L] of every row; None where all have L rows.
        starts: int32 [B + 1], the first row of every sequence, and N; None while captions are
            being written.
        seen_N: bool, False for rows that attention must not see; None where it may see all.
        causal: whether a row sees none of those after it.
    """

    batch: int
    longest: int
    indices: Tensor | None
    starts: Tensor | None = None
    seen_N: Tensor | None = None
    causal: bool = True

    @property
    def rows(self) -> int:
        """N, which the host knows without waiting for a device."""
        return self.batch * self.longest if self.indices is None else len(self.indices)

    def pad(self, x_ND: Tensor) -> Tensor:
        """[N, D] → [B, L, D], zero where no row belongs."""
        size = self.batch * self.longest
        x = x_ND if self.indices is None else _Scatter.apply(x_ND, self.indices, size)
        return x.unflatten(0, (self.batch, self.longest))

    def pack(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] → [N, D]."""
        x = x_BLD.flatten(0, 1)
        return x if self.indices is None else pick(x, self.indices)

    def map(self, function: Move) -> Packing:
        """The same with other tensors."""
        tensors = (self.indices, self.starts, self.seen_N)
        indices, starts, seen_N = (None if t is None else function(t) for t in tensors)
        return replace(self, indices=indices, starts=starts, seen_N=seen_N)

    def places(self) -> Tensor:
        """Where in its sequence each row stands, int64 [N]; not while captions are being written.

        Under OpenCLIP's CLS that is not its position.
        """
        if self.indices is not None:
            return self.indices % self.longest
        assert self.starts is not None
        return torch.arange(self.longest, device=self.starts.device).repeat(self.batch)

    def mean(self, x_ND: Tensor, counted_N: Tensor | None) -> Tensor:
        """Mean [B, D] over the rows of each sequence that count, added up in fp32 at least."""
        if counted_N is None:
            counted_N = x_ND.new_ones(len(x_ND), dtype=torch.bool)
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        total_BD = self.pad(x_ND * counted_N[:, None]).sum(1, dtype=wide)
        return (total_BD / self.pad(counted_N[:, None]).sum(1).clamp(min=1)).to(x_ND.dtype)

    def mask(self) -> Tensor | None:
        """Which keys may be seen, bool, [B, 1, L, L] or without order [B, 1, 1, L].

        None where all may be, or all up to the query.
        """
        if not self.causal:
            if self.seen_N is None and self.indices is None:
                return None
            seen_N = self.seen_N
            if seen_N is None:
                assert self.indices is not None
                seen_N = torch.ones_like(self.indices, dtype=torch.bool)
            return self.pad(seen_N[:, None]).squeeze(-1)[:, None, None, :]
        if self.seen_N is None:
            return None
        hidden_BL = self.pad(~self.seen_N[:, None]).squeeze(-1)
        ones = torch.ones(self.longest, self.longest, dtype=torch.bool, device=hidden_BL.device)
        return ones.tril() & ~hidden_BL[:, None, None, :]


@dataclass(frozen=True)
class PackedCaptions:
    """A batch of captions as the text tower and the decoder take it.

    Attributes:
        tokens_N: token id of every row of the text tower; that of a CLS row means nothing.
        positions_N: its row of the position embedding.
        pooled_B: the row of each caption that becomes its embedding.
        text: where the rows of the text tower lie.
        read_M: rows of the text tower that the decoder reads.
        decoder: where the decoder's rows lie.
        counted_K: rows of the decoder whose next token counts, None if all do.
        labels_K: that token.
        pooled: where the rows of those captions lie that become embeddings, which come first, if
            others follow them that the decoder alone reads (targets.py); None if none do.
    """

    tokens_N: Tensor
    positions_N: Tensor
    pooled_B: Tensor
    text: Packing
    read_M: Tensor
    decoder: Packing
    counted_K: Tensor | None
    labels_K: Tensor
    pooled: Packing | None = None

    def pooled_only(self) -> PackedCaptions:
        """What becomes embeddings alone, which no decoder can read."""
        if self.pooled is None:
            return self
        tokens_N, positions_N = (x[: self.pooled.rows] for x in (self.tokens_N, self.positions_N))
        text = self.pooled
        return replace(self, tokens_N=tokens_N, positions_N=positions_N, text=text, pooled=None)

    def to(self, device: torch.device) -> PackedCaptions:
        """The same on another device, without waiting for it."""
        return self.map(lambda tensor: sent(tensor, device))

    def map(self, function: Move) -> PackedCaptions:
        """The same with other tensors."""
        changed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Packing):
                changed[field.name] = value.map(function)
            elif value is not None:
                changed[field.name] = function(value)
        return replace(self, **changed)


# what a teacher takes of a micro-batch: captions of its own, or features that it has left
Lesson = PackedCaptions | Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The same on another device, for which the host does not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def pick(x_ND: Tensor, rows: Tensor) -> Tensor:
    """`x[rows]` for rows that are all different: its backward pass is deterministic everywhere."""
    picked: Tensor = _Pick.apply(x_ND, rows)
    return picked


def pack_captions(
    tokens_BT: Tensor,
    lengths_B: Tensor,
    reads_B: Tensor,
    pooled_B: Tensor | None,
    seen_BS: Tensor | None,
    pad_id: int,
) -> PackedCaptions:
    """Lay out captions.

    Args:
        tokens_BT: token ids.
        lengths_B: how many of them the text tower computes.
        reads_B: how many of those the decoder reads.
        pooled_B: index of the one whose output becomes the embedding; None for a CLS row of its
            own, which comes last and has position T.
        seen_BS: bool, keys that the text tower's attention may see: S = T, or T + 1 with the CLS.
        pad_id: id of tokens that are not learnt.
    """
    batch, context = tokens_BT.shape
    rows_B = lengths_B if pooled_B is not None else lengths_B + 1
    text, inside_BL = packing_of(rows_B)
    column_BL = torch.arange(text.longest, device=tokens_BT.device).expand(batch, -1)
    if pooled_B is None:
        column_BL = torch.where(column_BL < lengths_B[:, None], column_BL, context)
    first_B = rows_B.cumsum(0) - rows_B
    if seen_BS is not None:
        seen_N = seen_BS.gather(1, column_BL)[inside_BL]
        text = replace(text, seen_N=None if bool(seen_N.all()) else seen_N)
    padded_BS = F.pad(tokens_BT, (0, 1), value=pad_id)
    read_M, decoder, counted_K, labels_K = decoder_rows(first_B, tokens_BT, reads_B, pad_id)
    return PackedCaptions(
        tokens_N=padded_BS.gather(1, column_BL)[inside_BL],
        positions_N=column_BL[inside_BL],
        pooled_B=first_B + (pooled_B if pooled_B is not None else lengths_B),
        text=text,
        read_M=read_M,
        decoder=decoder,
        counted_K=counted_K,
        labels_K=labels_K,
    )


def decoder_rows(
    first_B: Tensor, tokens_BT: Tensor, reads_B: Tensor, pad_id: int
) -> tuple[Tensor, Packing, Tensor | None, Tensor]:
    """What a decoder reads of a text tower's rows, and learns.

    Args:
        first_B: row of the first token of each caption.
        tokens_BT: ids of what is learnt.
        reads_B: rows that are read of each.
        pad_id: id of tokens that are not learnt.

    Returns:
        `read_M`, `decoder`, `counted_K` and `labels_K` of `PackedCaptions`.
    """
    decoder, read_BL = packing_of(reads_B)
    column_BR = torch.arange(decoder.longest, device=tokens_BT.device).expand(len(reads_B), -1)
    labels = F.pad(tokens_BT, (0, 1), value=pad_id)[:, 1:][:, : decoder.longest][read_BL]
    counted = labels != pad_id
    rows = None if bool(counted.all()) else counted.nonzero().squeeze(1)
    read_M = (first_B[:, None] + column_BR)[read_BL]
    return read_M, decoder, rows, labels if rows is None else labels[rows]


def next_tokens(tokens_RT: Tensor, positions_T: Tensor) -> PackedCaptions:
    """Lay out the next tokens of captions that are being written; nothing is pooled or learnt.

    Args:
        tokens_RT: their ids.
        positions_T: where they stand in the captions.
    """
    rows, new = tokens_RT.shape
    nothing = positions_T.new_zeros(0)
    layout = Packing(rows, new, None)
    return PackedCaptions(
        tokens_N=tokens_RT.flatten(),
        positions_N=positions_T.repeat(rows),
        pooled_B=nothing,
        text=layout,
        read_M=torch.arange(rows * new, device=tokens_RT.device),
        decoder=layout,
        counted_K=nothing,
        labels_K=nothing,
    )


def real_lengths(tokens_BT: Tensor, pad_id: int) -> Tensor:
    """Tokens up to the last one that is not padding, int64 [B]."""
    after_BT = torch.arange(1, tokens_BT.shape[1] + 1, device=tokens_BT.device)
    return (after_BT * (tokens_BT != pad_id)).amax(1)


def packing_of(lengths_B: Tensor) -> tuple[Packing, Tensor]:
    """The layout of sequences of these lengths, and which of [B, L] have a row."""
    longest = max(1, int(lengths_B.max()))
    inside_BL = torch.arange(longest, device=lengths_B.device) < lengths_B[:, None]
    indices = None if bool(inside_BL.all()) else inside_BL.flatten().nonzero().squeeze(1)
    starts = F.pad(lengths_B.cumsum(0), (1, 0)).int()
    return Packing(len(lengths_B), longest, indices, starts), inside_BL


class _Scatter(torch.autograd.Function):
    """Rows into a larger tensor."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, indices: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(indices)
        return _rows_into(x_ND.new_zeros(size, x_ND.shape[1]), indices, x_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        return grads[0].index_select(0, indices), None, None


class _Pick(torch.autograd.Function):
    """Some rows of a tensor, none of them twice."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.size = len(x_ND)
        return x_ND.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        (grad,) = grads
        return _rows_into(grad.new_zeros(ctx.size, grad.shape[1]), rows, grad), None


def _rows_into(zeros_SD: Tensor, indices: Tensor, rows_ND: Tensor) -> Tensor:
    """Rows at their places. Not in place: compiled by torch 2.11, a function that changes its own
    result hands on a gradient of zero."""
    return zeros_SD.index_copy(0, indices, rows_ND)
