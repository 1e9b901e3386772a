"""Blocks of OpenCLIP's modern text towers and decoders (`text_arch: modern`).

Positions are rotations of queries and keys (Su et al. 2021) instead of a table; norms are RMSNorm,
MLPs SwiGLU (Shazeer 2020); queries and keys may be normalised (Dehghani et al. 2023), and what
attention reads may pass a gate (Qiu et al. 2025). A block of a decoder has its cross-attention
between self-attention and MLP. Everything runs over packed rows; letters as in layers.py. Names of
what is inside of a block are OpenCLIP's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from coca_scale.model.kv_cache import LayerCache
from coca_scale.model.layers import (
    Attention,
    TransformerBlock,
    cross_attention,
    linear,
    packed_self_attention,
)
from coca_scale.model.packing import Packing
from coca_scale.model.recompute import (
    Activation,
    ElementWise,
    LayerNorm,
    Linear,
    RMSNorm,
)
from coca_scale.model.tower_config import TransformerConfig

Rotation = tuple[Tensor, Tensor]  # cosines and sines [N, 1, d/2] of every row
SWIGLU_GAIN = 1.22  # of a·silu(b) over GELU, in the width of weights that give the same variance


def rotation(config: TransformerConfig, places_N: Tensor, dtype: torch.dtype) -> Rotation | None:
    """How queries and keys of rows at these places are turned; None without rotary positions."""
    if config.pos_embed == "none":
        return None
    width = config.width // config.heads
    pairs = torch.arange(0, width, 2, device=places_N.device, dtype=torch.float32)
    angles = places_N[:, None].float() * config.rope_temperature ** (-pairs / width)
    return angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]


def rotate(x_NHd: Tensor, by: Rotation) -> Tensor:
    """Each pair of neighbours (2i, 2i + 1) turned by the angle of its row and i."""
    cos, sin = by
    even, odd = x_NHd[..., ::2], x_NHd[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class SwiGLU(torch.autograd.Function):
    """a·silu(b) of a tensor [*, a and b]; autograd would keep silu(b) as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        a, b = x.chunk(2, dim=-1)
        return a * nn.functional.silu(b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        (grad,) = grads
        a, b = x.chunk(2, dim=-1)
        gate = torch.sigmoid(b)
        silu = b * gate
        return torch.cat([grad * silu, grad * a * (gate + silu * (1 - gate))], dim=-1)


def _swiglu(x: Tensor) -> Tensor:
    y: Tensor = SwiGLU.apply(x)
    return y


class GatedMLP(nn.Module):
    """Two linear layers with a gate between them, [*, D] → [*, D]."""

    def __init__(
        self, width: int, hidden: int, std: float, residual_std: float, bias: bool
    ) -> None:
        super().__init__()
        self.w12 = linear(width, 2 * hidden, SWIGLU_GAIN * std, bias)
        self.act = ElementWise(_swiglu)
        self.w3 = linear(hidden, width, residual_std, bias)

    def forward(self, x: Tensor | Activation) -> Tensor:
        """[*, D] → [*, D]."""
        return self.w3(self.act(self.w12(x)))


class PlainMLP(nn.Module):
    """Two linear layers with GELU between them, [*, D] → [*, D]."""

    def __init__(
        self, width: int, hidden: int, std: float, residual_std: float, bias: bool
    ) -> None:
        super().__init__()
        self.c_fc = linear(width, hidden, std, bias)
        self.act = ElementWise(nn.GELU())
        self.c_proj = linear(hidden, width, residual_std, bias)

    def forward(self, x: Tensor | Activation) -> Tensor:
        """[*, D] → [*, D]."""
        return self.c_proj(self.act(self.c_fc(x)))


def plain_norm(config: TransformerConfig, width: int) -> nn.RMSNorm | nn.LayerNorm:
    """A norm that is not in front of a linear layer: behind the last block, or of heads."""
    kind = nn.RMSNorm if config.norm_type == "rmsnorm" else nn.LayerNorm
    return kind(width, eps=config.norm_eps)


def _block_norm(config: TransformerConfig) -> RMSNorm | LayerNorm:
    kind = RMSNorm if config.norm_type == "rmsnorm" else LayerNorm
    return kind(config.width, eps=config.norm_eps)


class _ModernAttention(Attention):
    """What both kinds have behind and around their attention."""

    def __init__(self, config: TransformerConfig, residual_std: float) -> None:
        super().__init__(config.width, config.heads)
        width, std, bias = config.width, config.width**-0.5, config.attention_bias
        self.gate: Linear | None = None
        if config.attn_gated:
            self.gate = linear(
                width, width, std, bias if config.gate_bias is None else config.gate_bias
            )
            if self.gate.bias is not None:
                nn.init.ones_(self.gate.bias)  # mostly open: sigmoid(1) = 0.73
        self.q_norm, self.k_norm = (
            plain_norm(config, self.head_width) if config.qk_norm else nn.Identity() for _ in "qk"
        )
        self.proj = linear(width, width, residual_std, bias)

    def _heads(self, x: Tensor) -> Tensor:
        """[*, H·d] → [*, H, d]."""
        return x.unflatten(-1, (self.heads, -1))

    def _out(self, y: Tensor, x: Tensor | Activation) -> Tensor:
        """The output of attention `y`, of which inputs `x` decide how much passes."""
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj(y)


class ModernSelfAttention(_ModernAttention):
    """Attention of captions to themselves, with rotary positions."""

    def __init__(self, config: TransformerConfig, residual_std: float) -> None:
        super().__init__(config, residual_std)
        self.qkv = linear(config.width, 3 * config.width, config.width**-0.5, config.attention_bias)

    def forward(
        self,
        x: Tensor | Activation,
        by: Rotation | None,
        mask: Tensor | None,
        causal: bool,
        rows: Packing,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Rows [N, D] to themselves; as of `SelfAttention`, `by` from `rotation`."""
        q, k, v = (self._heads(t) for t in self.qkv(x).chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        if by is not None:
            q, k = rotate(q, by), rotate(k, by)
        qkv = torch.cat([t.flatten(-2) for t in (q, k, v)], dim=-1)
        return self._out(packed_self_attention(self, qkv, mask, causal, rows, cache), x)


class ModernCrossAttention(_ModernAttention):
    """Attention of captions to image tokens."""

    def __init__(self, config: TransformerConfig, residual_std: float) -> None:
        super().__init__(config, residual_std)
        width, std, bias = config.width, config.width**-0.5, config.attention_bias
        self.q = linear(width, width, std, bias)
        self.kv = linear(width, 2 * width, std, bias)

    def forward(
        self,
        x: Tensor | Activation,
        image_BSD: Tensor | None,
        rows: Packing,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Rows [N, D] to image tokens; as of `CrossAttention`."""
        q = self.q_norm(self._heads(self.q(x))).flatten(-2)
        kv = None if image_BSD is None else self._keys_and_values(image_BSD)
        return self._out(cross_attention(self, q, kv, rows, cache), x)

    def _keys_and_values(self, image_BSD: Tensor) -> Tensor:
        kv = self.kv(image_BSD)
        if isinstance(self.k_norm, nn.Identity):
            return kv
        k, v = kv.chunk(2, dim=-1)
        return torch.cat([self.k_norm(self._heads(k)).flatten(-2), v], dim=-1)


class ModernBlock(TransformerBlock):
    """Pre-norm transformer block over packed captions; with `crosses`, one that sees images."""

    def __init__(self, config: TransformerConfig, crosses: bool = False) -> None:
        super().__init__()
        width = config.width
        residual_std = width**-0.5 * (2 * config.layers) ** -0.5
        self.norm1 = _block_norm(config)
        self.attn = ModernSelfAttention(config, residual_std)
        self.norm_x: RMSNorm | LayerNorm | None = None
        self.xattn: ModernCrossAttention | None = None
        if crosses:
            self.norm_x = _block_norm(config)
            self.xattn = ModernCrossAttention(config, residual_std)
        self.norm2 = _block_norm(config)
        kind = GatedMLP if config.mlp_type == "swiglu" else PlainMLP
        hidden, std = int(width * config.mlp_ratio), (2 * width) ** -0.5
        self.mlp = kind(width, hidden, std, residual_std, config.mlp_bias)

    def forward(
        self,
        x: Tensor,
        by: Rotation | None,
        mask: Tensor | None,
        causal: bool,
        rows: Packing,
        cache: LayerCache | None = None,
        sees: bool = False,
        image_BSD: Tensor | None = None,
        image_cache: LayerCache | None = None,
    ) -> Tensor:
        """[N, D] → [N, D].

        Args:
            x: rows.
            by: from `rotation`.
            mask: as of `SelfAttention`.
            causal: as there.
            rows: where the rows lie.
            cache: of the tokens before.
            sees: whether the block's cross-attention takes part.
            image_BSD: image tokens; None if `image_cache` has their keys and values.
            image_cache: keeps these.
        """
        x = x + self.attn(self.norm1(x), by, mask, causal, rows, cache)
        if sees and self.xattn is not None and self.norm_x is not None:
            x = x + self.xattn(self.norm_x(x), image_BSD, rows, image_cache)
        return x + self.mlp(self.norm2(x))

    def cross_parameters(self) -> list[nn.Parameter]:
        """Those of the cross-attention."""
        parts = (self.norm_x, self.xattn)
        return [p for part in parts if part is not None for p in part.parameters()]
