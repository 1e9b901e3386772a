"""The image tower: a ViT with an optional attentional pooler."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coca_scale.model.config import VisionConfig
from coca_scale.model.layers import AttentionalPooler, Block, normal_parameter
from coca_scale.model.stack import run_blocks

# mean and standard deviation per RGB channel of OpenAI's CLIP, which OpenCLIP's CoCa models use
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def normalize_pixels(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 pixels [B, 3, H, W] → normalised images of `dtype`, computed in fp32."""
    mean = torch.tensor(IMAGE_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(IMAGE_STD, device=images.device).view(3, 1, 1)
    return ((images.float() / 255 - mean) / std).to(dtype)


class ImageTower(nn.Module):
    """ViT (Dosovitskiy et al. 2020) that returns one pooled vector and a sequence of tokens."""

    def __init__(self, config: VisionConfig, embed_dim: int, quick_gelu: bool) -> None:
        super().__init__()
        width, patch = config.width, config.patch_size
        self.activation_checkpointing = False
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        nn.init.normal_(self.patch_embedding.weight, std=(3 * patch * patch) ** -0.5)
        self.class_embedding = normal_parameter(width, std=width**-0.5)
        self.position_embedding = normal_parameter(config.grid**2 + 1, width, std=width**-0.5)
        self.norm_pre = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.mlp_ratio, config.layers, quick_gelu)
            for _ in range(config.layers)
        )
        self.pooler: AttentionalPooler | None = None
        pooled_width = width
        if config.attentional_pool:
            self.pooler = AttentionalPooler(
                embed_dim, width, config.attn_pooler_heads, config.attn_pooler_queries
            )
            pooled_width = embed_dim
        self.norm_post = nn.LayerNorm(pooled_width)
        self.projection = normal_parameter(pooled_width, embed_dim, std=pooled_width**-0.5)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode normalised images [B, 3, H, W].

        Returns:
            The pooled embedding [B, embed_dim], not normalised, and the tokens [B, S, D] that the
            decoder reads: the queries of the pooler but the first, or all patches without one.
        """
        patches_BSD = self.patch_embedding(images).flatten(2).transpose(1, 2)
        cls_B1D = self.class_embedding.expand(images.shape[0], 1, -1)
        x = torch.cat([cls_B1D, patches_BSD], dim=1) + self.position_embedding
        x = run_blocks(self.blocks, self.norm_pre(x), self.activation_checkpointing)
        if self.pooler is not None:
            x = self.pooler(x)
        x = self.norm_post(x)
        return x[:, 0] @ self.projection, x[:, 1:]
