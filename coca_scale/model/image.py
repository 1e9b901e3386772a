"""The image tower: a ViT, with or without attentional pooling."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from coca_scale.model.layers import AttentionalPooler, Block, BlockShape, Stack, normal_parameter
from coca_scale.model.patch_dropout import drop_patches
from coca_scale.model.preprocess import CHANNELS, Preprocess
from coca_scale.model.recompute import run_block
from coca_scale.model.tower_config import VisionConfig


def normalize_pixels(images: Tensor, dtype: torch.dtype, preprocess: Preprocess) -> Tensor:
    """uint8 pixels [B, 3, H, W] → normalised images of `dtype`, computed in fp32."""
    mean = _per_channel(preprocess.mean, images.device)
    std = _per_channel(preprocess.std, images.device)
    return ((images.float() / 255 - mean) / std).to(dtype)


@cache
def _per_channel(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """Kept there: a copy of every step's own would make the host wait for the device."""
    return torch.tensor(values, device=device).view(CHANNELS, 1, 1)


class PooledTower(nn.Module):
    """What every image tower of a CoCa or a MaMMUT ends with: pooling, norm and projection.

    `attentional_pool: true` is the CoCa of OpenCLIP 3: one pooler, then the norm; its first query
    becomes the embedding. "cascade" and "parallel" are those of CoCa2, which are the paper's: the
    norm first, and a contrastive pooler whose one query reads the tokens of the generative pooler,
    or what that reads. Its output is the embedding, without a projection.
    """

    def __init__(
        self, config: VisionConfig, width: int, embed_dim: int, query_std: float = 1.0
    ) -> None:
        super().__init__()
        heads, pooling = config.attn_pooler_heads, config.attentional_pool
        self.pooling, self.pool_type = pooling, config.pool_type
        self.norms_pooled = config.final_ln_after_pool and not pooling
        self.pooler: AttentionalPooler | None = None
        self.contrastive_pooler: AttentionalPooler | None = None
        self.projection: nn.Parameter | None = None
        if pooling:
            queries = config.attn_pooler_queries
            self.pooler = AttentionalPooler(embed_dim, width, heads, queries, query_std)
        if isinstance(pooling, str):
            context = embed_dim if pooling == "cascade" else width
            self.contrastive_pooler = AttentionalPooler(embed_dim, context, heads, 1, query_std)
            self.norm_post = nn.LayerNorm(width)
        else:
            pooled_width = embed_dim if pooling else width
            self.norm_post = nn.LayerNorm(pooled_width)
            self.projection = normal_parameter(pooled_width, embed_dim, std=pooled_width**-0.5)

    def pool(self, x_BSC: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of the last block → embedding [B, embed_dim], and tokens for the decoder."""
        if self.contrastive_pooler is not None:
            assert self.pooler is not None
            x = self.norm_post(x_BSC)
            tokens = self.pooler(x)
            context = tokens if self.pooling == "cascade" else x
            return self.contrastive_pooler(context)[:, 0], tokens
        assert self.projection is not None
        if self.pooler is not None:
            x_BSC = self.pooler(x_BSC)
        x = x_BSC if self.norms_pooled else self.norm_post(x_BSC)
        averages = self.pool_type != "tok" and self.pooler is None
        tokens = x if averages and self.pool_type == "avg_all" else x[:, 1:]
        pooled = tokens.mean(1) if averages else x[:, 0]
        return (self.norm_post(pooled) if self.norms_pooled else pooled) @ self.projection, tokens

    def contrastive_parameters(self) -> list[nn.Parameter]:
        """Those that only the contrastive loss trains."""
        if self.contrastive_pooler is not None:
            return list(self.contrastive_pooler.parameters())
        own = [self.projection] if self.projection is not None else []
        return [*own, *(self.norm_post.parameters() if self.norms_pooled else ())]

    def _pooling_parameters(self) -> list[nn.Parameter]:
        parts = (self.pooler, self.contrastive_pooler, self.norm_post)
        return [p for part in parts if part is not None for p in part.parameters()]

    def _head_groups(self) -> list[list[nn.Parameter]]:
        """The projection, if there is one."""
        return [] if self.projection is None else [[self.projection]]


class VisionTransformer(PooledTower):
    """ViT (Dosovitskiy et al. 2020) that returns one pooled vector and a sequence of tokens."""

    def __init__(self, config: VisionConfig, embed_dim: int, quick_gelu: bool) -> None:
        width, patch = config.width, config.patch_size
        super().__init__(config, width, embed_dim)
        self.patch_dropout = config.patch_dropout
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        nn.init.normal_(self.patch_embedding.weight, std=(3 * patch * patch) ** -0.5)
        self.class_embedding = normal_parameter(width, std=width**-0.5)
        self.position_embedding = normal_parameter(config.grid**2 + 1, width, std=width**-0.5)
        self.norm_pre = nn.LayerNorm(width)
        shape = BlockShape(width, config.heads, config.mlp_ratio, config.layers, quick_gelu)
        self.blocks = Stack[Block](Block(shape) for _ in range(config.layers))

    def forward(self, images: Tensor, sample_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode normalised images [B, 3, H, W].

        Args:
            images: normalised images.
            sample_ids: int64 [B], names of the samples in this run; drops patches where the config
                says so. Without them all patches are kept.

        Returns:
            The pooled embedding [B, embed_dim], not normalised, and the tokens [B, S, D] that the
            decoder reads: the queries of the pooler, or all patches without one.
        """
        patches_BSD = self.patch_embedding(images).flatten(2).transpose(1, 2)
        patches_BSD = patches_BSD + self.position_embedding[1:]
        if sample_ids is not None and self.patch_dropout:
            patches_BSD = drop_patches(patches_BSD, sample_ids, self.patch_dropout)
        cls_D = self.class_embedding + self.position_embedding[0]
        x = torch.cat([cls_D.expand(images.shape[0], 1, -1), patches_BSD], dim=1)
        x = self.norm_pre(x)
        for block in self.blocks:
            x = run_block(block, x)
        return self.pool(x)

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """Parameters from input to output, in as many groups as OpenCLIP's `lock` counts.

        Poolers, which OpenCLIP leaves out, go with the last block.
        """
        stem = [self.class_embedding, self.position_embedding]
        stem += [*self.patch_embedding.parameters(), *self.norm_pre.parameters()]
        blocks = [list(block.parameters()) for block in self.blocks]
        blocks[-1] += self._pooling_parameters()
        return [stem, *blocks, *self._head_groups()]
