"""The multimodal text decoder and its vocabulary head."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from coca_scale.losses.caption import Kernel, chunked_cross_entropy
from coca_scale.model.kv_cache import KVCache, LayerCache
from coca_scale.model.layers import Block, BlockShape, CrossBlock, Stack, normal_parameter
from coca_scale.model.modern import ModernBlock, plain_norm, rotation
from coca_scale.model.packing import Packing
from coca_scale.model.recompute import run_block
from coca_scale.model.tower_config import DecoderConfig


class MultimodalDecoder(nn.Module):
    """Causal blocks over text, each followed by cross-attention to the image tokens."""

    def __init__(self, config: DecoderConfig, quick_gelu: bool) -> None:
        super().__init__()
        layers, shape = config.layers, shape_of(config, quick_gelu)
        self.blocks = Stack[Block](Block(shape) for _ in range(layers))
        self.cross_blocks = Stack[CrossBlock](CrossBlock(shape) for _ in range(layers))
        self.norm_final = nn.LayerNorm(config.width)

    def forward(
        self, text_MD: Tensor, rows: Packing, image_BSD: Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        """Token features, the layout of their rows, and image tokens → hidden states [M, D].

        With a cache, the features are those of the next tokens, and image tokens are needed only
        with the first.
        """
        if image_BSD is not None:
            # the blocks differ in weight and bias of this norm alone
            image_BSD = F.layer_norm(image_BSD, image_BSD.shape[-1:])
        mask = None if cache is None else cache.causal_mask()
        x = text_MD
        for number, (block, cross) in enumerate(zip(self.blocks, self.cross_blocks, strict=True)):
            own, image = layer_caches(cache, number)
            x = run_block(block, x, mask, mask is None, rows, own)
            x = run_block(cross, x, image_BSD, rows, image)
        return self.norm_final(x)

    @property
    def cached_layers(self) -> int:
        """Every pair of blocks."""
        return len(self.blocks)

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """Pairs of blocks from input to output, the final norm with the last."""
        pairs = [
            [*block.parameters(), *cross.parameters()]
            for block, cross in zip(self.blocks, self.cross_blocks, strict=True)
        ]
        pairs[-1] += self.norm_final.parameters()
        return pairs


class ModernDecoder(nn.Module):
    """Causal blocks over text, with cross-attention to the image tokens inside."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        crosses = [number % config.cross_attn_ratio == 0 for number in range(config.layers)]
        self.blocks = Stack[ModernBlock](ModernBlock(config, sees) for sees in crosses)
        self.norm_final = plain_norm(config, config.width)

    def forward(
        self, text_MD: Tensor, rows: Packing, image_BSD: Tensor | None, cache: KVCache | None = None
    ) -> Tensor:
        """As of `MultimodalDecoder`."""
        by = rotation(self.config, places_of(rows, cache), text_MD.dtype)
        mask = None if cache is None else cache.causal_mask()
        x = text_MD
        for number, block in enumerate(self.blocks):
            own, image = layer_caches(cache, number)
            x = run_block(block, x, by, mask, mask is None, rows, own, True, image_BSD, image)
        return self.norm_final(x)

    @property
    def cached_layers(self) -> int:
        """Every block."""
        return len(self.blocks)

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """Blocks from input to output, the final norm with the last."""
        blocks = [list(block.parameters()) for block in self.blocks]
        blocks[-1] += self.norm_final.parameters()
        return blocks


def shape_of(config: DecoderConfig, quick_gelu: bool) -> BlockShape:
    """Of classic blocks."""
    return BlockShape(config.width, config.heads, config.mlp_ratio, config.layers, quick_gelu)


def layer_caches(cache: KVCache | None, number: int) -> tuple[LayerCache | None, LayerCache | None]:
    """Of captions, and of the image."""
    return (None, None) if cache is None else (cache.decoder[number], cache.image[number])


def places_of(rows: Packing, cache: KVCache | None) -> Tensor:
    """Where in its caption each row stands, int64 [M]."""
    return rows.places() if cache is None else cache.positions.new_T.repeat(rows.batch)


class CaptionHead(nn.Module):
    """Owns the [V, D] vocabulary matrix; the only place where logits come into being.

    The loss is computed inside `forward`, because under ZeRO-3 the weight exists only while its
    owner runs.
    """

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = normal_parameter(vocab_size, width, std=width**-0.5)
        self.chunk_rows = 2048
        self.label_smoothing = 0.0
        self.z_loss = 0.0
        self.kernel: Kernel = "torch"

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits, or with labels the summed loss.

        Args:
            hidden: [*, D]; [K, D] with labels.
            labels: int64 [K], or None for logits.

        Returns:
            Logits [*, V] in the dtype of `hidden`; with labels the fp32 sum of the cross-entropy, a
            scalar.
        """
        if labels is None:
            return hidden @ self.weight.T
        return chunked_cross_entropy(
            hidden,
            self.weight,
            labels,
            chunk_rows=self.chunk_rows,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            kernel=self.kernel,
        )
