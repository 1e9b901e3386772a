"""Attention, MLP and transformer blocks.

Shapes: B batch, T query length, S key length, D width, H heads. Every module initialises its own
parameters when it is built, with GPT-2 / CLIP style depth-scaled normals, so a freshly built model
is ready to train whatever it was built from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coca_scale.model.kv_cache import LayerCache
from coca_scale.model.packing import Packing
from coca_scale.model.recompute import (
    Activation,
    ElementWise,
    LayerNorm,
    Linear,
    NormScale,
    Recomputable,
)
from coca_scale.model.varlen import varlen_cross_attention, varlen_self_attention

# [B, T, 3·D] of so many heads → [B, T, D]; None where it does not take them
AttentionKernel = Callable[[Tensor, int], Tensor | None]
HEAD_WIDTH, MOST_TOKENS = 64, 257  # that attention_kernel.py is written for


def is_short(tokens: int, head_width: int, dtype: torch.dtype) -> bool:
    """Whether attention_kernel.py takes such sequences, on a GPU."""
    half = dtype in (torch.float16, torch.bfloat16)
    return half and head_width == HEAD_WIDTH and 1 <= tokens <= MOST_TOKENS


def normal_parameter(*shape: int, std: float) -> nn.Parameter:
    """A parameter drawn from N(0, std²)."""
    return nn.Parameter(torch.empty(*shape).normal_(std=std))


def linear(inputs: int, outputs: int, std: float, bias: bool = True) -> Linear:
    """A linear layer with weights from N(0, std²), and zero bias if it has one."""
    layer = Linear(inputs, outputs, bias)
    nn.init.normal_(layer.weight, std=std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class QuickGELU(nn.Module):
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise, any shape."""
        y: Tensor = _QuickGELU.apply(x)
        return y


class _QuickGELU(torch.autograd.Function):
    """x·σ(1.702 x), of which autograd would keep three tensors instead of x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(1.702 * x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(1.702 * x)
        return grads[0] * (gate + 1.702 * x * gate * (1 - gate))


class MLP(nn.Module):
    """Two linear layers with an activation between them, [*, D] → [*, D]."""

    def __init__(self, width: int, hidden: int, residual_std: float, quick_gelu: bool) -> None:
        super().__init__()
        self.fc = linear(width, hidden, (2 * width) ** -0.5)
        self.act = ElementWise(QuickGELU() if quick_gelu else nn.GELU())
        self.proj = linear(hidden, width, residual_std)

    def forward(self, x: Tensor | Activation) -> Tensor:
        """[*, D] → [*, D]."""
        return self.proj(self.act(self.fc(x)))


class Attention(nn.Module):
    """Attention of several heads.

    Attributes:
        heads: their number.
        head_width: of each.
        varlen: whether captions stay packed in attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.varlen = False


class SelfAttention(Attention):
    """Multi-head self-attention with one fused projection.

    Attributes:
        kernel: for sequences without a mask.
    """

    def __init__(self, width: int, heads: int, residual_std: float) -> None:
        super().__init__(width, heads)
        self.kernel: AttentionKernel | None = None
        self.qkv = linear(width, 3 * width, width**-0.5)
        self.out = linear(width, width, residual_std)

    def forward(
        self,
        x: Tensor | Activation,
        mask: Tensor | None,
        causal: bool,
        rows: Packing | None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attention inside each sequence.

        Args:
            x: [B, T, D], or with `rows` [N, D].
            mask: boolean, True where a key may be seen, broadcastable to [B, H, T, T], with a cache
                to [B, H, T, L]; not looked at where captions stay packed.
            causal: no key after the query may be seen; not together with a mask.
            rows: where the rows lie if `x` is ragged.
            cache: of the tokens before; those of `x` are added.

        Returns:
            As `x`.
        """
        qkv = self.qkv(x)
        if rows is not None:
            return self.out(packed_self_attention(self, qkv, mask, causal, rows, cache))
        if self.kernel is not None and mask is None and not causal and cache is None:
            y = self.kernel(qkv, self.heads)
            if y is not None:
                return self.out(y)
        q, k, v = (split_heads(t, self.heads) for t in qkv.chunk(3, dim=-1))
        if cache is not None:
            k, v = cache.extend(k, v)
        return self.out(attend(q, k, v, mask, causal))


class CrossAttention(Attention):
    """Multi-head attention from queries to a context."""

    def __init__(self, width: int, context_width: int, heads: int, residual_std: float) -> None:
        super().__init__(width, heads)
        self.q = linear(width, width, width**-0.5)
        self.kv = linear(context_width, 2 * width, context_width**-0.5)
        self.out = linear(width, width, residual_std)

    def forward(
        self,
        x: Tensor | Activation,
        context_BSC: Activation | None,
        rows: Packing | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Attention of each sequence to its context.

        Args:
            x: queries [B, T, D], with `rows` [N, D], or [T, D] that all sequences share; with a
                cache, several sequences in a row may have the same context.
            context_BSC: what is attended to; None if `cache` has its keys and values.
            rows: where the rows lie if `x` is ragged.
            cache: keeps keys and values of the context.

        Returns:
            As `x`, and [B, T, D] of shared queries.
        """
        kv = None if context_BSC is None else self.kv(context_BSC)
        return self.out(cross_attention(self, self.q(x), kv, rows, cache))


def packed_self_attention(
    attention: Attention,
    qkv_N3D: Tensor,
    mask: Tensor | None,
    causal: bool,
    rows: Packing,
    cache: LayerCache | None,
) -> Tensor:
    """Of packed queries, keys and values, [N, D]; other arguments as of `SelfAttention`."""
    if attention.varlen and cache is None:
        return varlen_self_attention(qkv_N3D, rows, attention.heads)
    assert mask is not None or rows.seen_N is None
    q, k, v = (split_heads(t, attention.heads) for t in rows.pad(qkv_N3D).chunk(3, dim=-1))
    if cache is not None:
        k, v = cache.extend(k, v)
    return rows.pack(attend(q, k, v, mask, causal))


def cross_attention(
    attention: Attention,
    q: Tensor,
    kv_BS2D: Tensor | None,
    rows: Packing | None,
    cache: LayerCache | None,
) -> Tensor:
    """Of queries as `CrossAttention` takes them, to the keys and values of a context.

    Without these they are in the cache.
    """
    if kv_BS2D is None:
        assert cache is not None and cache.pair is not None
        k, v = cache.pair
    else:
        if attention.varlen and rows is not None and cache is None:
            return varlen_cross_attention(q, kv_BS2D, rows, attention.heads)
        k, v = (split_heads(t, attention.heads) for t in kv_BS2D.chunk(2, dim=-1))
        if cache is not None:
            cache.pair = (k, v)
    if rows is not None:
        q = rows.pad(q)
    elif q.ndim == 2:
        q = q.expand(len(k), -1, -1).contiguous()  # not every kernel takes a stride of 0
    if cache is not None:
        q = q.reshape(len(k), -1, q.shape[-1])  # a context's sequences, one after the other
    y = attend(split_heads(q, attention.heads), k, v)
    return y if rows is None else rows.pack(y)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, D] → [B, H, T, D/H]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Scaled dot-product attention of [B, H, T, d] tensors, returned as [B, T, H·d]."""
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return x.transpose(1, 2).flatten(2)


@dataclass(frozen=True)
class BlockShape:
    """Sizes of the blocks of a tower with `depth` layers."""

    width: int
    heads: int
    mlp_ratio: float
    depth: int
    quick_gelu: bool

    @property
    def residual_std(self) -> float:
        """Of weights that write into the residual stream; the deeper, the smaller."""
        return float(self.width**-0.5 * (2 * self.depth) ** -0.5)

    def mlp(self) -> MLP:
        """A fresh MLP."""
        hidden = int(self.width * self.mlp_ratio)
        return MLP(self.width, hidden, self.residual_std, self.quick_gelu)


class TransformerBlock(Recomputable):
    """A block of a tower or decoder of this package."""


class Block(TransformerBlock):
    """Pre-norm transformer block."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.norm1 = LayerNorm(shape.width)
        self.attn = SelfAttention(shape.width, shape.heads, shape.residual_std)
        self.norm2 = LayerNorm(shape.width)
        self.mlp = shape.mlp()

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        rows: Packing | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """[B, T, D], or with `rows` [N, D]; returns the same."""
        x = x + self.attn(self.norm1(x), mask, causal, rows, cache)
        return x + self.mlp(self.norm2(x))


class CrossBlock(TransformerBlock):
    """Pre-norm block that attends to image tokens instead of the text itself."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.norm1 = LayerNorm(shape.width)
        self.norm_kv = NormScale(shape.width)
        self.attn = CrossAttention(shape.width, shape.width, shape.heads, shape.residual_std)
        self.norm2 = LayerNorm(shape.width)
        self.mlp = shape.mlp()

    def forward(
        self,
        x: Tensor,
        image_BSD: Tensor | None,
        rows: Packing | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Text [B, T, D], or with `rows` [N, D], and normalised image tokens; returns text.

        Without image tokens, their keys and values are taken from `cache`.
        """
        context = None if image_BSD is None else self.norm_kv(image_BSD)
        x = x + self.attn(self.norm1(x), context, rows, cache)
        return x + self.mlp(self.norm2(x))


B = TypeVar("B", bound=Recomputable)


class Stack(nn.ModuleList, Generic[B]):
    """Blocks of one kind, from input to output."""

    def __iter__(self) -> Iterator[B]:
        """In order."""
        return cast("Iterator[B]", super().__iter__())

    def at(self, index: int) -> B:
        """One of them."""
        return cast("B", self[index])


class AttentionalPooler(nn.Module):
    """Learned queries that read the image: [B, S, C] → [B, Q, D] (CoCa, section 3.2)."""

    def __init__(
        self, width: int, context_width: int, heads: int, queries: int, query_std: float = 1.0
    ) -> None:
        super().__init__()
        self.query = normal_parameter(queries, width, std=query_std)
        self.norm_q = nn.LayerNorm(width)
        self.norm_kv = LayerNorm(context_width)
        self.attn = CrossAttention(width, context_width, heads, residual_std=width**-0.5)

    def forward(self, x_BSC: Tensor) -> Tensor:
        """Returns [B, Q, D]."""
        return self.attn(self.norm_q(self.query), self.norm_kv(x_BSC))
