"""MaMMUT (Kuo et al. 2023): one text tower, used in two passes over the same weights.

The contrastive pass sees a whole caption in both directions and takes the mean of its tokens; the
caption pass is causal, and in every `cross_attn_ratio`-th block attends to the image. Both are over
packed rows, and both begin with the same embeddings, which are therefore computed once.

`MammutText` is the text tower of a `CoCa` and runs the contrastive pass; what it hands on to the
decoder are embeddings. `MammutDecoder` runs the caption pass through the tower's blocks, which it
does not own, with cross-attention and the projection of image tokens, which it does. (A modern
block has its cross-attention inside: there the tower owns that, too.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_scale.model.decoder import layer_caches, places_of, shape_of
from coca_scale.model.kv_cache import KVCache
from coca_scale.model.layers import Block, CrossBlock, Stack, linear, normal_parameter
from coca_scale.model.modern import ModernBlock, plain_norm, rotation
from coca_scale.model.packing import PackedCaptions, Packing, pack_captions, real_lengths
from coca_scale.model.recompute import run_block
from coca_scale.model.targets import Targets, with_targets
from coca_scale.model.tower_config import DecoderConfig

# applies block `number` to rows
Step = Callable[[int, Tensor], Tensor]


class MammutText(nn.Module):
    """The text tower; as a `towers.TextTower`, its contrastive pass."""

    def __init__(self, config: DecoderConfig, embed_dim: int, quick_gelu: bool) -> None:
        super().__init__()
        self.config = config
        self.pad_id = config.pad_id
        width, layers = config.width, range(config.layers)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.position_embedding: nn.Parameter | None = None
        self.blocks: Stack[Block] | Stack[ModernBlock]
        self.norm_final: nn.Module
        if config.modern:
            crosses = [number % config.cross_attn_ratio == 0 for number in layers]
            self.blocks = Stack[ModernBlock](ModernBlock(config, sees) for sees in crosses)
            self.norm_final = plain_norm(config, config.width)
        else:
            self.position_embedding = normal_parameter(config.context_length, width, std=0.01)
            shape = shape_of(config, quick_gelu)
            self.blocks = Stack[Block](Block(shape) for _ in layers)
            self.norm_final = nn.LayerNorm(width)
        self.projection: nn.Linear | None = None
        if config.proj_type == "linear":
            self.projection = linear(width, embed_dim, width**-0.5, bias=False)

    @property
    def cached_layers(self) -> int:
        """None: all are the decoder's."""
        return 0

    def pack(
        self, tokens_BT: Tensor, keep_padding: bool = False, targets: Targets | None = None
    ) -> PackedCaptions:
        """Lay out token ids [B, T], T up to the context length, for `forward`, and targets.

        Padding inside of a caption is hidden; of an empty caption the first token is not. With
        `use_pad_mask: false`, as LAION trained, padding is a part of the caption.
        """
        given, hides = tokens_BT.shape[1], self.config.use_pad_mask
        if not hides:
            tokens_BT = self._filled(tokens_BT)
        seen_BT = tokens_BT != self.pad_id
        real_B = real_lengths(tokens_BT, self.pad_id)
        lengths_B, reads_B = real_B.clamp(min=1), (real_B - 1).clamp(min=0)
        if keep_padding or not hides:
            lengths_B = torch.full_like(real_B, tokens_BT.shape[1])
        if keep_padding:
            reads_B = torch.full_like(real_B, given)
        seen_BT[:, 0] |= real_B == 0
        none_B = torch.zeros_like(real_B)  # not used: the mean is the embedding
        seen = seen_BT if hides else None
        first = pack_captions(tokens_BT, lengths_B, reads_B, none_B, seen, self.pad_id)
        first = replace(first, text=replace(first.text, causal=False))
        if targets is not None and not hides:
            targets = replace(targets, tokens_BT=self._filled(targets.tokens_BT))
        return with_targets(first, tokens_BT, targets, None, self.pad_id, keep_padding)

    def _filled(self, tokens_BT: Tensor) -> Tensor:
        """With padding up to the context length."""
        missing = self.config.context_length - tokens_BT.shape[1]
        return F.pad(tokens_BT, (0, missing), value=self.pad_id)

    def forward(
        self, captions: PackedCaptions, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode captions as `pack` lays them out, or embed those after `cache`.

        Returns:
            The pooled embedding [B, embed_dim], not normalised, and the embeddings of all rows
            [N, D], which is what the decoder reads.
        """
        x = self.token_embedding(captions.tokens_N)
        if self.position_embedding is not None:
            x = x + F.embedding(captions.positions_N, self.position_embedding)
        if cache is not None:
            return x[:0], x
        rows = captions.pooled or captions.text
        step = self.step(rows, captions.positions_N[: rows.rows], x.dtype)
        y = x[: rows.rows]
        for number in range(len(self.blocks)):
            y = step(number, y)
        pooled = rows.mean(self.norm_final(y), rows.seen_N)
        return pooled if self.projection is None else self.projection(pooled), x

    def step(
        self,
        rows: Packing,
        places_N: Tensor,
        dtype: torch.dtype,
        image_BSD: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Step:
        """What applies one block after the other to rows of captions.

        Args:
            rows: where they lie; whether they see what comes after them.
            places_N: where in its caption each stands.
            dtype: of their features.
            image_BSD: what the cross-attention of modern blocks reads; without it and a cache that
                takes no part.
            cache: of captions that are being written.
        """
        mask = rows.mask() if cache is None else cache.causal_mask()
        if cache is None and any(block.attn.varlen for block in self.blocks):
            mask = None
        causal = mask is None and rows.causal
        by = rotation(self.config, places_N, dtype) if self.config.modern else None
        sees = image_BSD is not None or cache is not None

        def run(number: int, x: Tensor) -> Tensor:
            block = self.blocks.at(number)
            own, image = layer_caches(cache, number)
            if not self.config.modern:
                return run_block(block, x, mask, causal, rows, own)
            return run_block(block, x, by, mask, causal, rows, own, sees, image_BSD, image)

        return run

    def contrastive_parameters(self) -> list[nn.Parameter]:
        """Those that only the contrastive loss trains."""
        return [] if self.projection is None else list(self.projection.parameters())

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """Embeddings, each block, the final norm with the last, and a projection."""
        stem = list(self.token_embedding.parameters())
        if self.position_embedding is not None:
            stem.append(self.position_embedding)
        blocks = [list(block.parameters()) for block in self.blocks]
        blocks[-1] += self.norm_final.parameters()
        head = self.contrastive_parameters()
        return [stem, *blocks, *([head] if head else [])]


class MammutDecoder(nn.Module):
    """The caption pass through the blocks of a `MammutText`."""

    def __init__(
        self, config: DecoderConfig, text: MammutText, image_width: int, quick_gelu: bool
    ) -> None:
        super().__init__()
        self.ratio = config.cross_attn_ratio
        self._text = (text,)  # not a module of this one: it has its place in the model
        self.image_projection = linear(image_width, config.width, image_width**-0.5, bias=False)
        self.cross_blocks: Stack[CrossBlock] | None = None
        if not config.modern:
            shape = shape_of(config, quick_gelu)
            crosses = range(0, config.layers, self.ratio)
            self.cross_blocks = Stack[CrossBlock](CrossBlock(shape) for _ in crosses)

    @property
    def cached_layers(self) -> int:
        """Every block of the tower."""
        return len(self._text[0].blocks)

    def forward(
        self, text_MD: Tensor, rows: Packing, image_BSD: Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        """As of `towers.Decoder`, of embeddings."""
        (text,) = self._text
        context = None if image_BSD is None else self.image_projection(image_BSD)
        step = text.step(rows, places_of(rows, cache), text_MD.dtype, context, cache)
        if self.cross_blocks is not None and context is not None:
            context = F.layer_norm(context, context.shape[-1:])  # as in `MultimodalDecoder`
        x = text_MD
        for number in range(self.cached_layers):
            x = step(number, x)
            if self.cross_blocks is not None and number % self.ratio == 0:
                cross = self.cross_blocks.at(number // self.ratio)
                x = run_block(cross, x, context, rows, layer_caches(cache, number)[1])
        hidden: Tensor = text.norm_final(x)
        return hidden

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """The projection of image tokens, and cross-attention from input to output."""
        crosses = self.cross_blocks if self.cross_blocks is not None else ()
        return [list(self.image_projection.parameters()), *(list(c.parameters()) for c in crosses)]
