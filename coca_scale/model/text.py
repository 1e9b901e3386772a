"""The unimodal text tower: a causal transformer with a CLS token at the end."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coca_scale.model.config import TextConfig
from coca_scale.model.layers import Block, normal_parameter
from coca_scale.model.stack import run_blocks


class TextTower(nn.Module):
    """Causal text encoder; its tokens feed the decoder, its CLS output the contrastive loss."""

    def __init__(self, config: TextConfig, embed_dim: int, quick_gelu: bool) -> None:
        super().__init__()
        width = config.width
        self.pad_id = config.pad_id
        self.activation_checkpointing = False
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.class_embedding = normal_parameter(width, std=0.01)
        self.position_embedding = normal_parameter(config.context_length + 1, width, std=0.01)
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.mlp_ratio, config.layers, quick_gelu)
            for _ in range(config.layers)
        )
        self.norm_final = nn.LayerNorm(width)
        self.projection = normal_parameter(width, embed_dim, std=width**-0.5)

    def forward(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Encode token ids [B, T], T up to the context length.

        Returns:
            The pooled embedding [B, embed_dim], not normalised, and token features [B, T, D] from
            before the final norm, as OpenCLIP feeds them to its decoder.
        """
        length = tokens_BT.shape[1] + 1
        cls_B1D = self.class_embedding.expand(tokens_BT.shape[0], 1, -1)
        x = torch.cat([self.token_embedding(tokens_BT), cls_B1D], dim=1)
        x = x + self.position_embedding[:length]
        mask = attention_mask(tokens_BT, self.pad_id)
        x = run_blocks(self.blocks, x, self.activation_checkpointing, mask)
        return self.norm_final(x[:, -1]) @ self.projection, x[:, :-1]


def attention_mask(tokens_BT: Tensor, pad_id: int) -> Tensor:
    """Causal mask with padding, boolean [B, 1, T+1, T+1], True where a key may be seen.

    The padding mask is one place too far to the right: key j is hidden when token j−1 is padding.
    That is OpenCLIP's mask, and the published CoCa weights were trained with it; with the mask
    where it belongs their text features come out 0.43 (relative) away.
    """
    shifted_BS = torch.nn.functional.pad(tokens_BT != pad_id, (1, 0), value=True)
    length = shifted_BS.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=tokens_BT.device).tril()
    return causal & shifted_BS[:, None, None, :]
