"""Attention of captions over their rows as they are packed: nothing is laid out with padding.

Two operations of torch, whose kernels in Triton (varlen_kernel.py) are imported when they first
run, so that a plan counts them where Triton is not installed. Gradients are packed as inputs are.

Letters: B captions, N rows of all of them, H heads, W width of all heads together, S rows of the
context of a caption.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import (
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from coca_scale.model.packing import Packing

MOST_HEAD_WIDTH = 128


def varlen_self_attention(qkv: Tensor, rows: Packing, heads: int) -> Tensor:
    """Attention inside each caption, causal or not, to rows that may be seen.

    Args:
        qkv: fp16 or bf16 [N, 3·W], queries, keys and values of all heads.
        rows: of the captions.
        heads: H, each with a multiple of 8 columns, of at most `MOST_HEAD_WIDTH`.

    Returns:
        [N, W]; zero for a row that sees nothing.
    """
    assert rows.starts is not None
    out: Tensor = _self(qkv, rows.starts, rows.seen_N, heads, rows.longest, rows.causal)[0]
    return out


def varlen_cross_attention(q: Tensor, kv: Tensor, rows: Packing, heads: int) -> Tensor:
    """Attention of each caption to all rows of its context.

    Args:
        q: fp16 or bf16 [N, W], queries of all heads.
        kv: [B, S, 2·W], keys and values.
        rows: of the captions.
        heads: as above.

    Returns:
        [N, W].
    """
    assert rows.starts is not None
    out: Tensor = _cross(q, kv, rows.starts, heads, rows.longest)[0]
    return out


@torch.library.custom_op("coca_scale::varlen_self_attention", mutates_args=())
def _self(
    qkv: Tensor, starts: Tensor, seen: Tensor | None, heads: int, longest: int, causal: bool
) -> tuple[Tensor, Tensor]:
    from coca_scale.model.varlen_kernel import forward

    out, lse = _self_outputs(qkv, starts, seen, heads, longest, causal)
    forward(qkv.contiguous().chunk(3, dim=1), starts, seen, out, lse, None, causal)
    return out, lse


@_self.register_fake
def _self_outputs(
    qkv: Tensor, _starts: Tensor, _seen: Tensor | None, heads: int, _longest: int, _causal: bool
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3), _sums(qkv, heads)


@torch.library.custom_op("coca_scale::varlen_self_attention_backward", mutates_args=())
def _self_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    seen: Tensor | None,
    _longest: int,
    causal: bool,
) -> Tensor:
    from coca_scale.model.varlen_kernel import backward

    qkv = qkv.contiguous()
    dqkv = torch.empty_like(qkv)
    inputs, grads = qkv.chunk(3, dim=1), dqkv.chunk(3, dim=1)
    backward(grad.contiguous(), inputs, out, lse, starts, seen, grads, None, causal)
    return dqkv


@_self_backward.register_fake
def _self_gradient(_grad: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


@torch.library.custom_op("coca_scale::varlen_cross_attention", mutates_args=())
def _cross(
    q: Tensor, kv: Tensor, starts: Tensor, heads: int, longest: int
) -> tuple[Tensor, Tensor]:
    from coca_scale.model.varlen_kernel import forward

    out, lse = _cross_outputs(q, kv, starts, heads, longest)
    pair = kv.contiguous().flatten(0, 1).chunk(2, dim=1)
    forward((q.contiguous(), *pair), starts, None, out, lse, kv.shape[1], False)
    return out, lse


@_cross.register_fake
def _cross_outputs(
    q: Tensor, _kv: Tensor, _starts: Tensor, heads: int, _longest: int
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _sums(q, heads)


@torch.library.custom_op("coca_scale::varlen_cross_attention_backward", mutates_args=())
def _cross_backward(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    _longest: int,
) -> tuple[Tensor, Tensor]:
    from coca_scale.model.varlen_kernel import backward

    q, kv = q.contiguous(), kv.contiguous()
    dq, dkv = torch.empty_like(q), torch.empty_like(kv)
    inputs = (q, *kv.flatten(0, 1).chunk(2, dim=1))
    grads = (dq, *dkv.flatten(0, 1).chunk(2, dim=1))
    backward(grad.contiguous(), inputs, out, lse, starts, None, grads, kv.shape[1], False)
    return dq, dkv


@_cross_backward.register_fake
def _cross_gradients(_grad: Tensor, q: Tensor, kv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), kv.new_empty(kv.shape)


def _sums(x_ND: Tensor, heads: int) -> Tensor:
    """Room for a logarithm per head and row."""
    return x_ND.new_empty(heads, x_ND.shape[0], dtype=torch.float32)  # len() would fix the length


def _keep_self(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, starts, seen, _, ctx.longest, ctx.causal = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output, starts, seen)


def _differentiate_self(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    made = None
    if grad is not None:
        made = _self_backward(grad, *ctx.saved_tensors, ctx.longest, ctx.causal)
    return made, None, None, None, None, None


def _keep_cross(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, kv, starts, _, ctx.longest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, kv, *output, starts)


def _differentiate_cross(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None
    return *_cross_backward(grad, *ctx.saved_tensors, ctx.longest), None, None, None


_self.register_autograd(_differentiate_self, setup_context=_keep_self)
_cross.register_autograd(_differentiate_cross, setup_context=_keep_cross)


def _heads_apart(
    width: int, starts: torch.Size, heads: int, length: int
) -> tuple[int, int, int, int]:
    """All captions as long as the longest one, as they would be with padding."""
    return starts[0] - 1, heads, length, width // heads


@register_flop_formula(torch.ops.coca_scale.varlen_self_attention)
def _self_flops(
    qkv: torch.Size,
    starts: torch.Size,
    _seen: Any,
    heads: int,
    longest: int,
    _causal: bool,
    **_: Any,
) -> int:
    count: int = sdpa_flop_count(*[_heads_apart(qkv[1] // 3, starts, heads, longest)] * 3)
    return count


@register_flop_formula(torch.ops.coca_scale.varlen_self_attention_backward)
def _self_backward_flops(
    grad: torch.Size,
    _qkv: Any,
    _out: Any,
    lse: torch.Size,
    starts: torch.Size,
    _seen: Any,
    longest: int,
    _causal: bool,
    **_: Any,
) -> int:
    count: int = sdpa_backward_flop_count(*[_heads_apart(grad[1], starts, lse[0], longest)] * 4)
    return count


@register_flop_formula(torch.ops.coca_scale.varlen_cross_attention)
def _cross_flops(
    q: torch.Size, kv: torch.Size, starts: torch.Size, heads: int, longest: int, **_: Any
) -> int:
    queries = _heads_apart(q[1], starts, heads, longest)
    count: int = sdpa_flop_count(queries, *[_heads_apart(q[1], starts, heads, kv[1])] * 2)
    return count


@register_flop_formula(torch.ops.coca_scale.varlen_cross_attention_backward)
def _cross_backward_flops(
    grad: torch.Size,
    _q: Any,
    kv: torch.Size,
    _out: Any,
    lse: torch.Size,
    starts: torch.Size,
    longest: int,
    **_: Any,
) -> int:
    queries = _heads_apart(grad[1], starts, lse[0], longest)
    keys = _heads_apart(grad[1], starts, lse[0], kv[1])
    count: int = sdpa_backward_flop_count(queries, queries, keys, keys)
    return count
