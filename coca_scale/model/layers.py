"""Attention, MLP and transformer blocks.

Shapes: B batch, T query length, S key length, D width, H heads. Every module initialises its own
parameters when it is built, with GPT-2 / CLIP style depth-scaled normals, so a freshly built model
is ready to train whatever it was built from.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def normal_parameter(*shape: int, std: float) -> nn.Parameter:
    """A parameter drawn from N(0, std²)."""
    return nn.Parameter(torch.empty(*shape).normal_(std=std))


def linear(inputs: int, outputs: int, std: float) -> nn.Linear:
    """A linear layer with weights from N(0, std²) and zero bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise, any shape."""
        return x * torch.sigmoid(1.702 * x)


class MLP(nn.Sequential):
    """Two linear layers with an activation between them, [*, D] → [*, D]."""

    def __init__(self, width: int, hidden: int, residual_std: float, quick_gelu: bool) -> None:
        super().__init__()
        self.fc = linear(width, hidden, (2 * width) ** -0.5)
        self.act = QuickGELU() if quick_gelu else nn.GELU()
        self.proj = linear(hidden, width, residual_std)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection."""

    def __init__(self, width: int, heads: int, residual_std: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = linear(width, 3 * width, width**-0.5)
        self.out = linear(width, width, residual_std)

    def forward(self, x_BTD: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """`mask` is boolean, True where a key may be seen, broadcastable to [B, H, T, T]."""
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(x_BTD).chunk(3, dim=-1))
        return self.out(attend(q, k, v, mask, causal))


class CrossAttention(nn.Module):
    """Multi-head attention from queries [B, T, D] to a context [B, S, C]."""

    def __init__(self, width: int, context_width: int, heads: int, residual_std: float) -> None:
        super().__init__()
        self.heads = heads
        self.q = linear(width, width, width**-0.5)
        self.kv = linear(context_width, 2 * width, context_width**-0.5)
        self.out = linear(width, width, residual_std)

    def forward(self, x_BTD: Tensor, context_BSC: Tensor) -> Tensor:
        """Returns [B, T, D]."""
        k, v = (split_heads(t, self.heads) for t in self.kv(context_BSC).chunk(2, dim=-1))
        return self.out(attend(split_heads(self.q(x_BTD), self.heads), k, v))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, D] → [B, H, T, D/H]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Scaled dot-product attention of [B, H, T, d] tensors, returned as [B, T, H·d]."""
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return x.transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Pre-norm transformer block of a tower with `depth` layers."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, depth: int, quick_gelu: bool
    ) -> None:
        super().__init__()
        residual_std = width**-0.5 * (2 * depth) ** -0.5
        self.norm1 = nn.LayerNorm(width)
        self.attn = SelfAttention(width, heads, residual_std)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(width * mlp_ratio), residual_std, quick_gelu)

    def forward(self, x_BTD: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Returns [B, T, D]."""
        x_BTD = x_BTD + self.attn(self.norm1(x_BTD), mask, causal)
        return x_BTD + self.mlp(self.norm2(x_BTD))


class CrossBlock(nn.Module):
    """Pre-norm block that attends to image tokens instead of the text itself."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, depth: int, quick_gelu: bool
    ) -> None:
        super().__init__()
        residual_std = width**-0.5 * (2 * depth) ** -0.5
        self.norm1 = nn.LayerNorm(width)
        self.norm_kv = nn.LayerNorm(width)
        self.attn = CrossAttention(width, width, heads, residual_std)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(width * mlp_ratio), residual_std, quick_gelu)

    def forward(self, x_BTD: Tensor, image_BSD: Tensor) -> Tensor:
        """Returns [B, T, D]."""
        x_BTD = x_BTD + self.attn(self.norm1(x_BTD), self.norm_kv(image_BSD))
        return x_BTD + self.mlp(self.norm2(x_BTD))


class AttentionalPooler(nn.Module):
    """Learned queries that read the image: [B, S, C] → [B, Q, D] (CoCa, section 3.2)."""

    def __init__(self, width: int, context_width: int, heads: int, queries: int) -> None:
        super().__init__()
        self.query = normal_parameter(queries, width, std=1.0)
        self.norm_q = nn.LayerNorm(width)
        self.norm_kv = nn.LayerNorm(context_width)
        self.attn = CrossAttention(width, context_width, heads, residual_std=width**-0.5)

    def forward(self, x_BSC: Tensor) -> Tensor:
        """Returns [B, Q, D]."""
        query = self.norm_q(self.query).expand(x_BSC.shape[0], -1, -1)
        return self.attn(query, self.norm_kv(x_BSC))
