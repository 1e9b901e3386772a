"""The unimodal text tower: a causal transformer, in a CoCa with a CLS token at the end."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coca_scale.model.config import TextConfig
from coca_scale.model.layers import Block, normal_parameter
from coca_scale.model.stack import run_blocks


class TextTower(nn.Module):
    """Causal text encoder; its tokens feed the decoder, its CLS output the contrastive loss.

    Without `embed_cls`, as in a CLIP, the output at the end token takes the place of the CLS.
    """

    def __init__(self, config: TextConfig, embed_dim: int, quick_gelu: bool) -> None:
        super().__init__()
        width = config.width
        self.pad_id = config.pad_id
        self.end_id = config.eos_id if config.pool_type == "eos" else None
        self.correct_cls_mask = config.correct_cls_mask
        self.activation_checkpointing = False
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.class_embedding = normal_parameter(width, std=0.01) if config.embed_cls else None
        positions = config.context_length + config.embed_cls
        self.position_embedding = normal_parameter(positions, width, std=0.01)
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
        if self.class_embedding is None:
            return self._without_cls(tokens_BT)
        length = tokens_BT.shape[1] + 1
        cls_B1D = self.class_embedding.expand(tokens_BT.shape[0], 1, -1)
        x = torch.cat([self.token_embedding(tokens_BT), cls_B1D], dim=1)
        x = x + self.position_embedding[:length]
        mask = attention_mask(tokens_BT, self.pad_id, self.correct_cls_mask)
        x = run_blocks(self.blocks, x, self.activation_checkpointing, mask)
        return self.norm_final(x[:, -1]) @ self.projection, x[:, :-1]

    def _without_cls(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        x = self.token_embedding(tokens_BT) + self.position_embedding[: tokens_BT.shape[1]]
        x = run_blocks(self.blocks, x, self.activation_checkpointing, None, True)
        is_end = tokens_BT if self.end_id is None else (tokens_BT == self.end_id).int()
        rows = torch.arange(len(x), device=x.device)
        return self.norm_final(x[rows, is_end.argmax(1)]) @ self.projection, x

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


def attention_mask(tokens_BT: Tensor, pad_id: int, correct_cls_mask: bool = False) -> Tensor:
    """Causal mask with padding, boolean [B, 1, T+1, T+1], True where a key may be seen.

    By default the padding mask is one place too far to the right: key j is hidden when token j−1 is
    padding. That is OpenCLIP's mask, and the published CoCa weights were trained with it; with the
    mask where it belongs (`correct_cls_mask`) their text features come out 0.43 (relative) away.
    """
    front, back = (0, 1) if correct_cls_mask else (1, 0)
    seen_BS = torch.nn.functional.pad(tokens_BT != pad_id, (front, back), value=True)
    length = seen_BS.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=tokens_BT.device).tril()
    return causal & seen_BS[:, None, None, :]
