"""The KV cache: what a model keeps of the captions it is writing; each token is computed once.

Every tensor has its full size from the start, so a step's shapes never change and it can be
compiled. Shapes: R captions being written, n of them (beams or samples) per image, B images, T new
tokens, L the most tokens of a caption, S image tokens, H heads, d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class CachePositions:
    """Where in a caption of `length` positions the `new_T` ones are, after `filled` others."""

    length: int
    filled: int
    new_T: Tensor


class LayerCache:
    """Keys and values of one attention layer.

    Attributes:
        pair: both, [R, H, L, d] for text and [B, H, S, d] for images; None before the first tokens.
    """

    def __init__(self, positions: CachePositions) -> None:
        self._positions = positions
        self.pair: tuple[Tensor, Tensor] | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write those of the new tokens, [R, H, T, d], to their positions; returns those of all."""
        if self.pair is None:
            rows, heads, _, width = keys.shape
            shape = (rows, heads, self._positions.length, width)
            self.pair = (keys.new_zeros(shape), values.new_zeros(shape))
        for kept, written in zip(self.pair, (keys, values), strict=True):
            kept.index_copy_(2, self._positions.new_T, written)
        return self.pair

    def take(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""
        if self.pair is not None:
            self.pair = (self.pair[0][rows], self.pair[1][rows])


class KVCache:
    """All that is kept between one token and the next, of every layer.

    Attributes:
        positions: where the new tokens stand.
        tokens_RL: ids of all tokens so far.
        text: keys and values of the text tower, a layer after the other.
        decoder: those of the decoder's self-attention.
        image: keys and values of the image tokens, of which each image has one row.
        transformers: the cache of a text tower from that library.
    """

    def __init__(self, length: int, text_layers: int, decoder_layers: int) -> None:
        self.positions = CachePositions(length, 0, torch.zeros(0, dtype=torch.long))
        self.text = [LayerCache(self.positions) for _ in range(text_layers)]
        self.decoder = [LayerCache(self.positions) for _ in range(decoder_layers)]
        self.image = [LayerCache(self.positions) for _ in range(decoder_layers)]
        self.transformers: Any = None

    def begin(self, tokens_RT: Tensor) -> None:
        """Take note of new tokens, before they are computed."""
        rows, new = tokens_RT.shape
        positions = self.positions
        assert positions.filled + new <= positions.length
        positions.new_T = torch.arange(
            positions.filled, positions.filled + new, device=tokens_RT.device
        )
        if not positions.filled:
            self.tokens_RL = tokens_RT.new_zeros(rows, positions.length)
        self.tokens_RL.index_copy_(1, positions.new_T, tokens_RT)

    def end(self) -> None:
        """The new tokens have been computed."""
        self.positions.filled += len(self.positions.new_T)

    def causal_mask(self) -> Tensor:
        """Which positions each new token may see: its own and all before, bool [T, L]."""
        new_T = self.positions.new_T
        return torch.arange(self.positions.length, device=new_T.device) <= new_T[:, None]

    def take(self, rows: Tensor) -> None:
        """Caption i becomes what caption `rows[i]` was; both are of the same image."""
        self.tokens_RL = self.tokens_RL[rows]
        for layer in (*self.text, *self.decoder):
            layer.take(rows)
        if self.transformers is not None:
            self.transformers.reorder_cache(rows)

    def repeat(self, times: int) -> None:
        """Each caption `times` times, one after the other."""
        rows = torch.arange(len(self.tokens_RL), device=self.tokens_RL.device)
        self.take(rows.repeat_interleave(times))
