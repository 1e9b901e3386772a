"""OpenCLIP's modern text tower: causal, rotary, of any length."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coca_scale.model.kv_cache import KVCache
from coca_scale.model.layers import Stack, linear
from coca_scale.model.modern import ModernBlock, plain_norm, rotation
from coca_scale.model.packing import PackedCaptions, pack_captions, pick, real_lengths
from coca_scale.model.recompute import run_block
from coca_scale.model.targets import Targets, with_targets
from coca_scale.model.tower_config import TextConfig, TransformerConfig


def token_embedding(config: TransformerConfig) -> nn.Embedding:
    """Fresh embeddings; that of padding is zero and never trains where the config says so."""
    frozen = config.pad_id if config.pad_is_frozen else None
    embedding = nn.Embedding(config.vocab_size, config.width, padding_idx=frozen)
    nn.init.normal_(embedding.weight, std=0.02)
    if frozen is not None:
        with torch.no_grad():
            embedding.weight[frozen].zero_()
    return embedding


class ModernText(nn.Module):
    """Causal text encoder; the decoder reads what comes out of its final norm."""

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.pad_id = config.pad_id
        self.token_embedding = token_embedding(config)
        self.blocks = Stack[ModernBlock](ModernBlock(config) for _ in range(config.layers))
        self.norm_final = plain_norm(config, config.width)
        width = config.width
        self.projection = linear(width, embed_dim, width**-0.5, bias=False)

    @property
    def cached_layers(self) -> int:
        """Every block."""
        return len(self.blocks)

    def pack(
        self, tokens_BT: Tensor, keep_padding: bool = False, targets: Targets | None = None
    ) -> PackedCaptions:
        """Lay out token ids [B, T], T up to the context length, for `forward`, and targets.

        Pooled is the first end token, or without one the last token that is no padding.
        """
        real_B = real_lengths(tokens_BT, self.pad_id)
        is_end = tokens_BT == self.config.eos_id
        last_B = ((tokens_BT != self.pad_id).sum(1) - 1).clamp(min=0)
        pooled_B = torch.where(is_end.any(1), is_end.int().argmax(1), last_B)
        lengths_B = torch.maximum(real_B, pooled_B + 1)
        reads_B = (real_B - 1).clamp(min=0)
        if keep_padding:
            lengths_B = reads_B = torch.full_like(real_B, tokens_BT.shape[1])
        first = pack_captions(tokens_BT, lengths_B, reads_B, pooled_B, None, self.pad_id)
        return with_targets(first, tokens_BT, targets, None, self.pad_id, keep_padding)

    def forward(
        self, captions: PackedCaptions, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """As of `towers.TextTower`; the features of all rows are those behind the final norm."""
        x = self.token_embedding(captions.tokens_N)
        by = rotation(self.config, captions.positions_N, x.dtype)
        mask = None if cache is None else cache.causal_mask()
        for number, block in enumerate(self.blocks):
            kept = None if cache is None else cache.text[number]
            x = run_block(block, x, by, mask, mask is None, captions.text, kept)
        x = self.norm_final(x)
        return self.projection(self._pooled(x, captions)), x

    def _pooled(self, x_ND: Tensor, captions: PackedCaptions) -> Tensor:
        if self.config.pool_type == "mean" and len(captions.pooled_B):
            rows = captions.pooled or captions.text
            real_N = captions.tokens_N[: rows.rows] != self.pad_id
            # of an empty caption the first token, as OpenCLIP does; others pool a real one
            real_N = real_N.index_fill(0, captions.pooled_B, True)
            return rows.mean(x_ND[: rows.rows], real_N)
        return pick(x_ND, captions.pooled_B)

    def contrastive_parameters(self) -> list[nn.Parameter]:
        """Those that only the contrastive loss trains."""
        return list(self.projection.parameters())

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """Embeddings, each block, the final norm with the last, projection."""
        blocks = [list(block.parameters()) for block in self.blocks]
        blocks[-1] += self.norm_final.parameters()
        return [
            list(self.token_embedding.parameters()),
            *blocks,
            list(self.projection.parameters()),
        ]
