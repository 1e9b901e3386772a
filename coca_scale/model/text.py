"""The unimodal text tower: a causal transformer, in a CoCa with a CLS token at the end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_scale.model.kv_cache import KVCache
from coca_scale.model.layers import Block, BlockShape, Stack, normal_parameter
from coca_scale.model.packing import PackedCaptions, Packing, pack_captions, pick, real_lengths
from coca_scale.model.recompute import run_block
from coca_scale.model.targets import Targets, with_targets
from coca_scale.model.tower_config import TextConfig


class TextTransformer(nn.Module):
    """Causal text encoder; its tokens feed the decoder, its CLS output the contrastive loss.

    Without `embed_cls`, as in a CLIP, the output at the end token takes the place of the CLS.
    """

    def __init__(self, config: TextConfig, embed_dim: int, quick_gelu: bool) -> None:
        super().__init__()
        width = config.width
        self.pad_id = config.pad_id
        self.end_id = config.eos_id if config.pool_type == "eos" else None
        self.correct_cls_mask = config.correct_cls_mask
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.has_cls = config.embed_cls
        self.class_embedding = normal_parameter(width, std=0.01) if self.has_cls else None
        positions = config.context_length + config.embed_cls
        self.position_embedding = normal_parameter(positions, width, std=0.01)
        shape = BlockShape(width, config.heads, config.mlp_ratio, config.layers, quick_gelu)
        self.blocks = Stack[Block](Block(shape) for _ in range(config.layers))
        self.norm_final = nn.LayerNorm(width)
        self.projection = normal_parameter(width, embed_dim, std=width**-0.5)

    @property
    def cached_layers(self) -> int:
        """Every block."""
        return len(self.blocks)

    def pack(
        self, tokens_BT: Tensor, keep_padding: bool = False, targets: Targets | None = None
    ) -> PackedCaptions:
        """Lay out token ids [B, T], T up to the context length, for `forward`, and targets.

        A CLS row has position T. Under OpenCLIP's mask it sees one pad, which is kept with it.
        Looks at no parameter: under ZeRO-3 that would be a collective, in a thread of one rank.
        """
        context = tokens_BT.shape[1]
        real_B = real_lengths(tokens_BT, self.pad_id)
        reads_B = (real_B - 1).clamp(min=0)
        seen_BS = pooled_B = None
        if self.has_cls:
            lengths_B = (real_B + (not self.correct_cls_mask)).clamp(max=context)
            seen_BS = visible_keys(tokens_BT, self.pad_id, self.correct_cls_mask)
        else:
            end = tokens_BT if self.end_id is None else (tokens_BT == self.end_id).int()
            pooled_B = end.argmax(1)
            lengths_B = torch.maximum(real_B, pooled_B + 1)
        if keep_padding:
            lengths_B = reads_B = torch.full_like(real_B, context)
        first = pack_captions(tokens_BT, lengths_B, reads_B, pooled_B, seen_BS, self.pad_id)
        seen_BT = None
        if self.has_cls and targets is not None:
            inputs_BT = targets.inputs(self.pad_id)
            seen_BT = visible_keys(inputs_BT, self.pad_id, self.correct_cls_mask)[:, :-1]
        return with_targets(first, tokens_BT, targets, seen_BT, self.pad_id, keep_padding)

    def forward(
        self, captions: PackedCaptions, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode captions as `pack` lays them out, or as `next_tokens` does those after `cache`.

        Returns:
            The pooled embedding [B, embed_dim], not normalised, and the features of all rows [N, D]
            from before the final norm, as OpenCLIP feeds them to its decoder.
        """
        x = self.token_embedding(captions.tokens_N)
        if self.class_embedding is not None:
            nowhere = torch.zeros(len(x), 1, dtype=torch.bool, device=x.device)
            is_cls = nowhere.index_fill(0, captions.pooled_B, True)  # an assignment would wait
            x = torch.where(is_cls, self.class_embedding, x)
        x = x + F.embedding(captions.positions_N, self.position_embedding)
        mask = self._mask(captions.text) if cache is None else self._cache_mask(cache)
        for number, block in enumerate(self.blocks):
            kept = None if cache is None else cache.text[number]
            x = run_block(block, x, mask, mask is None, captions.text, kept)
        return self.norm_final(pick(x, captions.pooled_B)) @ self.projection, x

    def _mask(self, rows: Packing) -> Tensor | None:
        """What captions may see that are laid out with padding, bool [B, 1, L, L]."""
        return None if any(block.attn.varlen for block in self.blocks) else rows.mask()

    def _cache_mask(self, cache: KVCache) -> Tensor:
        """What the next tokens may see, bool [R, 1, T, L], or [T, L] where all see alike."""
        if not self.has_cls:
            return cache.causal_mask()
        seen_RL = visible_keys(cache.tokens_RL, self.pad_id, self.correct_cls_mask)[:, :-1]
        return cache.causal_mask() & seen_RL[:, None, None, :]

    def contrastive_parameters(self) -> list[nn.Parameter]:
        """Those that only the contrastive loss trains."""
        own = [self.projection, *self.norm_final.parameters()]
        return own if self.class_embedding is None else [self.class_embedding, *own]

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """Parameters from input to output, in as many groups as OpenCLIP's `lock` counts."""
        stem = [*self.token_embedding.parameters(), self.position_embedding]
        if self.class_embedding is not None:
            stem.append(self.class_embedding)
        blocks = [list(block.parameters()) for block in self.blocks]
        blocks[-1] += self.norm_final.parameters()
        return [stem, *blocks, [self.projection]]


def visible_keys(tokens_BT: Tensor, pad_id: int, correct_cls_mask: bool = False) -> Tensor:
    """Which keys of [tokens, CLS] attention may see, boolean [B, T+1].

    By default the padding mask is one place too far to the right: key j is hidden when token j−1 is
    padding. That is OpenCLIP's mask, and the published CoCa weights were trained with it; with the
    mask where it belongs (`correct_cls_mask`) their text features come out 0.43 (relative) away.
    """
    front, back = (0, 1) if correct_cls_mask else (1, 0)
    return F.pad(tokens_BT != pad_id, (front, back), value=True)
