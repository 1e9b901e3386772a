"""Captions that a model learns to write, where they are not those that its pictures are matched to.

One text tower encodes both: first the captions that are pooled, all of them, and behind them those
that only the decoder reads, so that weights are gathered once and nothing is computed that no loss
needs. A caption that is the same for both is there once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coca_scale.model.packing import (
    PackedCaptions,
    decoder_rows,
    packing_of,
    real_lengths,
)


@dataclass(frozen=True)
class Targets:
    """What is to be written of a batch of pictures.

    In a caption that is predicted in parallel (CapPa, Tschannen et al. 2023) every input is the
    first token, which all captions begin with: what comes next follows from the picture and the
    place alone. Causal attention hides nothing in it, as all inputs are equal, but how long it is.
    The start token has a place in every vocabulary, no padding mask hides it, and what it means at
    the first place is the same either way.

    Attributes:
        tokens_BT: int64, ids, padded.
        parallel_B: bool, which captions are predicted in parallel; None where none is.
    """

    tokens_BT: Tensor
    parallel_B: Tensor | None = None

    def inputs(self, pad_id: int) -> Tensor:
        """What the model reads, int64 [B, T]."""
        if self.parallel_B is None:
            return self.tokens_BT
        place_T = torch.arange(self.tokens_BT.shape[1], device=self.tokens_BT.device)
        inside_BT = place_T < real_lengths(self.tokens_BT, pad_id)[:, None]
        hidden_BT = inside_BT & self.parallel_B[:, None]
        return torch.where(hidden_BT, self.tokens_BT[:, :1], self.tokens_BT)

    def separate(self, tokens_BT: Tensor) -> Tensor:
        """Which need rows of their own beside captions that are pooled, bool [B]."""
        differ_B = (self.tokens_BT != tokens_BT).any(1)
        return differ_B if self.parallel_B is None else differ_B | self.parallel_B

    def split(self, size: int) -> list[Targets]:
        """In pieces of `size` captions."""
        tokens = self.tokens_BT.split(size)
        if self.parallel_B is None:
            return [Targets(part) for part in tokens]
        return [Targets(*part) for part in zip(tokens, self.parallel_B.split(size), strict=True)]

    def __getitem__(self, rows: Tensor) -> Targets:
        """Those of some pictures, in another order."""
        parallel = None if self.parallel_B is None else self.parallel_B[rows]
        return Targets(self.tokens_BT[rows], parallel)

    @classmethod
    def cat(cls, pieces: Sequence[Targets | None]) -> Targets | None:
        """Pieces as one; all of them are there, or none, and so are their parts."""
        found = [piece for piece in pieces if piece is not None]
        if not found:
            return None
        assert len(found) == len(pieces), "a piece without targets"
        parallel = [piece.parallel_B for piece in found if piece.parallel_B is not None]
        tokens = torch.cat([piece.tokens_BT for piece in found])
        return cls(tokens, torch.cat(parallel) if parallel else None)


def with_targets(
    first: PackedCaptions,
    tokens_BT: Tensor,
    targets: Targets | None,
    seen_BT: Tensor | None,
    pad_id: int,
    keep_padding: bool,
) -> PackedCaptions:
    """Add what is to be written to a layout, for a tower in which no token sees those after it.

    Args:
        first: layout of the captions that are pooled.
        tokens_BT: their ids.
        targets: of the same pictures; None where it is what is pooled.
        seen_BT: bool, inputs of the targets that the text tower's attention may see; None if all.
        pad_id: id of tokens that are not learnt.
        keep_padding: whether every token has a row.
    """
    if targets is None:
        return first
    assert targets.tokens_BT.shape == tokens_BT.shape
    assert first.text.starts is not None
    separate_B = targets.separate(tokens_BT)
    reads_B = (real_lengths(targets.tokens_BT, pad_id) - 1).clamp(min=0)
    if keep_padding:
        reads_B = torch.full_like(reads_B, tokens_BT.shape[1])
    own_S, before = reads_B[separate_B], first.text.starts.diff().long()
    if not len(own_S):
        return first
    text, inside = packing_of(torch.cat([before, own_S]))
    inside_ST = inside[len(tokens_BT) :]
    column_ST = torch.arange(text.longest, device=tokens_BT.device).expand(inside_ST.shape)

    def rows_of(x_BT: Tensor) -> Tensor:
        """[B, T] → those of the rows that are added."""
        return x_BT[separate_B][:, : text.longest][inside_ST[:, : x_BT.shape[1]]]

    rows_N, known_N = rows_of(targets.inputs(pad_id)), first.text.seen_N
    if known_N is not None or seen_BT is not None:
        known_N = torch.ones_like(first.tokens_N).bool() if known_N is None else known_N
        added_N = torch.ones_like(rows_N).bool() if seen_BT is None else rows_of(seen_BT)
        seen_N = torch.cat([known_N, added_N])
        text = replace(text, seen_N=None if bool(seen_N.all()) else seen_N)
    starts_B = first.text.starts[:-1].long()
    starts_B[separate_B] = len(first.tokens_N) + own_S.cumsum(0) - own_S
    written_BT = targets.tokens_BT
    read_M, decoder, counted_K, labels_K = decoder_rows(starts_B, written_BT, reads_B, pad_id)
    return PackedCaptions(
        tokens_N=torch.cat([first.tokens_N, rows_N]),
        positions_N=torch.cat([first.positions_N, column_ST[inside_ST]]),
        pooled_B=first.pooled_B,
        text=text,
        read_M=read_M,
        decoder=decoder,
        counted_K=counted_K,
        labels_K=labels_K,
        pooled=first.text,
    )
