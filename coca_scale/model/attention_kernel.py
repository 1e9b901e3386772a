"""Self-attention over short sequences in Triton, from a packed projection to a packed gradient.

A program has one head of one sample, and nothing is summed over programs: results do not depend
on the order in which a GPU works. Forward, all keys and values stay in shared memory while tiles
of queries pass. Backward there are two kinds of programs, one in which keys stay and queries pass,
for the gradient of queries, and one in which queries stay and keys pass, for those of keys and
values: scores are computed twice, and in return no sum outlives a tile.

A ViT's 256 patches and one class token are 257 tokens, which tiles would fill up to 320 or 512.
Where the length is one more than a power of two, the last token stands `beside` the tiles: what
it has to do with the others is computed by vector arithmetic.

Letters: B batch, L tokens, H heads, D head dimension, N tokens in tiles (L, or L - 1 with one
beside, filled up to a power of two), M those of one tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import (
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from coca_scale.model.layers import HEAD_WIDTH, is_short

INTERPRETED: bool = triton.knobs.runtime.interpret  # on the CPU, for tests
LOG2_E = tl.constexpr(1.4426950408889634)
FORWARD = {"tile": 64, "stay": 128, "num_warps": 4, "num_stages": 3}
BACKWARD = {"tile": 64, "stay": 128, "tile_k": 64, "stay_q": 64, "num_warps": 4, "num_stages": 2}


@triton.jit
def _load(  # type: ignore[no-untyped-def]
    matrix, rows, stride: tl.constexpr, limit: tl.constexpr, full: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Rows [*, D] of a matrix, zero from `limit` on."""
    pointers = matrix + rows[:, None] * stride + tl.arange(0, D)[None, :]
    if full:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=rows[:, None] < limit, other=0.0)


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    matrix, rows, x, stride: tl.constexpr, limit: tl.constexpr, full: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Write rows [*, D] of a matrix up to `limit`."""
    pointers = matrix + rows[:, None] * stride + tl.arange(0, D)[None, :]
    x = x.to(matrix.dtype.element_ty)
    if full:
        tl.store(pointers, x)
    else:
        tl.store(pointers, x, mask=rows[:, None] < limit)


@triton.jit
def _load_row(row, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row [D] in fp32."""
    return tl.load(row + tl.arange(0, D)).to(tl.float32)


@triton.jit
def _store_row(row, x, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write one row [D]."""
    tl.store(row + tl.arange(0, D), x.to(row.dtype.element_ty))


@triton.jit
def _load_tiles(  # type: ignore[no-untyped-def]
    matrix, stride: tl.constexpr, limit: tl.constexpr, N: tl.constexpr, size: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """N rows as tiles that stay in shared memory."""
    tiles = ()
    for i in tl.static_range(N // size):
        rows = i * size + tl.arange(0, size)
        tiles += (_load(matrix, rows, stride, limit, (i + 1) * size <= limit, D),)  # type: ignore[assignment]
    return tiles


@triton.jit
def _products(x, y):  # type: ignore[no-untyped-def]
    """Products of the rows of x [*, D] with y [D] by vector arithmetic."""
    return tl.sum(x.to(tl.float32) * y[None, :], 1)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    qkv, out, lse, H: tl.constexpr, L: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    beside: tl.constexpr, tile: tl.constexpr, stay: tl.constexpr,
):  # fmt: skip
    """Writes also the logarithms, to the base 2, of the sums of exponentials of scores."""
    scale: tl.constexpr = LOG2_E * D**-0.5
    width: tl.constexpr = H * D
    stride: tl.constexpr = 3 * width
    limit: tl.constexpr = L - beside
    full: tl.constexpr = limit % tile == 0
    head = tl.program_id(0).to(tl.int64)
    qkv += head // H * (L * stride) + head % H * D
    out += head // H * (L * width) + head % H * D
    lse += head * L
    keys = _load_tiles(qkv + width, stride, limit, N, stay, D)
    values = _load_tiles(qkv + 2 * width, stride, limit, N, stay, D)
    if beside:
        last = qkv + limit * stride
        q_1 = _load_row(last, D)
        k_1 = _load_row(last + width, D)
        v_1 = _load_row(last + 2 * width, D)
        s_1 = tl.sum(q_1 * k_1, 0) * scale
        largest_1 = s_1
        scores = ()
        for i in tl.static_range(N // stay):
            scores += (_products(keys[i], q_1) * scale,)  # type: ignore[assignment]
            largest_1 = tl.maximum(largest_1, tl.max(scores[i], 0))
        total_1 = tl.exp2(s_1 - largest_1)
        y_1 = v_1 * total_1
        for i in tl.static_range(N // stay):
            p_1 = tl.exp2(scores[i] - largest_1)
            total_1 += tl.sum(p_1, 0)
            y_1 += tl.sum(p_1[:, None] * values[i].to(tl.float32), 0)
        _store_row(out + limit * width, y_1 / total_1, D)
        tl.store(lse + limit, largest_1 + tl.log2(total_1))
    for start in range(0, limit, tile):
        m = start + tl.arange(0, tile)
        q = _load(qkv, m, stride, limit, full, D)
        if beside:
            largest = _products(q, k_1) * scale
            total = tl.full([tile], 1.0, tl.float32)
            y = tl.broadcast_to(v_1[None, :], [tile, D])
        else:
            largest = tl.full([tile], -float("inf"), tl.float32)
            total = tl.zeros([tile], tl.float32)
            y = tl.zeros([tile, D], tl.float32)
        for i in tl.static_range(N // stay):
            s = tl.dot(q, tl.trans(keys[i]))
            if (i + 1) * stay > limit:
                s = tl.where(i * stay + tl.arange(0, stay)[None, :] < limit, s, -float("inf"))
            higher = tl.maximum(largest, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - higher[:, None])
            fade = tl.exp2(largest - higher)
            total = total * fade + tl.sum(p, 1)
            y = tl.dot(p.to(q.dtype), values[i], y * fade[:, None])
            largest = higher
        _store(out, m, y / total[:, None], width, limit, full, D)
        tl.store(lse + m, largest + tl.log2(total), mask=m < limit)


@triton.jit
def _beside(x, y, a, b, lse, delta, scale: tl.constexpr):  # type: ignore[no-untyped-def]
    """Probabilities and gradients of scores between one token and many, by vector arithmetic.

    The one is a query [D] with its output gradient and the many are keys [*, D] with their values,
    or the one is a key with its value and the many are queries with their output gradients.
    """
    p = tl.exp2(_products(x, a) * scale - lse)
    return p, p * (_products(y, b) - delta)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad, qkv, out, lse, stats, dqkv, H: tl.constexpr, L: tl.constexpr, D: tl.constexpr,
    N: tl.constexpr, beside: tl.constexpr, tile: tl.constexpr, stay: tl.constexpr,
    tile_k: tl.constexpr, stay_q: tl.constexpr,
):  # fmt: skip
    """`stats` [B, H, 2, N] is memory for what programs need of their own queries' sums."""
    natural: tl.constexpr = D**-0.5
    scale: tl.constexpr = LOG2_E * natural
    width: tl.constexpr = H * D
    stride: tl.constexpr = 3 * width
    limit: tl.constexpr = L - beside
    full: tl.constexpr = limit % tile == 0
    full_k: tl.constexpr = limit % tile_k == 0
    head = (tl.program_id(0) // 2).to(tl.int64)  # neighbours read the same, one of them from cache
    qkv += head // H * (L * stride) + head % H * D
    dqkv += head // H * (L * stride) + head % H * D
    out += head // H * (L * width) + head % H * D
    grad += head // H * (L * width) + head % H * D
    lse += head * L
    stats += head * (2 * N)
    kind = dqkv.dtype.element_ty
    last = qkv + limit * stride
    if beside:
        q_1 = _load_row(last, D)
        k_1 = _load_row(last + width, D)
        v_1 = _load_row(last + 2 * width, D)
        do_1 = _load_row(grad + limit * width, D)
        delta_1 = tl.sum(do_1 * _load_row(out + limit * width, D), 0)
        lse_1 = tl.load(lse + limit)
        p_1 = tl.exp2(tl.sum(q_1 * k_1, 0) * scale - lse_1)
        ds_1 = p_1 * (tl.sum(do_1 * v_1, 0) - delta_1)
    if tl.program_id(0) % 2 == 0:
        keys = _load_tiles(qkv + width, stride, limit, N, stay, D)
        values = _load_tiles(qkv + 2 * width, stride, limit, N, stay, D)
        if beside:
            dqs = tl.zeros([stay, D], tl.float32)
            for i in tl.static_range(N // stay):
                ds_N = _beside(keys[i], values[i], q_1, do_1, lse_1, delta_1, scale)[1]
                dqs += ds_N[:, None] * keys[i].to(tl.float32)
            _store_row(dqkv + limit * stride, (ds_1 * k_1 + tl.sum(dqs, 0)) * natural, D)
        for start in range(0, limit, tile):
            m = start + tl.arange(0, tile)
            q = _load(qkv, m, stride, limit, full, D)
            do = _load(grad, m, width, limit, full, D)
            o = _load(out, m, width, limit, full, D)
            lse_M = tl.load(lse + m, mask=m < limit, other=float("inf"))
            delta_M = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
            if beside:  # read again, as registers are scarce here
                k_1 = _load_row(last + width, D)
                v_1 = _load_row(last + 2 * width, D)
                ds_M = _beside(q, do, k_1, v_1, lse_M, delta_M, scale)[1]
                dq = ds_M[:, None] * k_1[None, :]
            else:
                dq = tl.zeros([tile, D], tl.float32)
            for i in tl.static_range(N // stay):
                s = tl.dot(q, tl.trans(keys[i]))
                dp = tl.dot(do, tl.trans(values[i]))
                p = tl.exp2(s * scale - lse_M[:, None])
                if (i + 1) * stay > limit:
                    p = tl.where(i * stay + tl.arange(0, stay)[None, :] < limit, p, 0.0)
                ds = p * (dp - delta_M[:, None])
                dq = tl.dot(ds.to(kind), keys[i], dq)
            _store(dqkv, m, dq * natural, stride, limit, full, D)
    else:
        queries = _load_tiles(qkv, stride, limit, N, stay_q, D)
        grads = _load_tiles(grad, width, limit, N, stay_q, D)
        if beside:
            dks = tl.zeros([stay_q, D], tl.float32)
            dvs = tl.zeros([stay_q, D], tl.float32)
        for i in tl.static_range(N // stay_q):
            m = i * stay_q + tl.arange(0, stay_q)
            o = _load(out, m, width, limit, (i + 1) * stay_q <= limit, D)
            lse_M = tl.load(lse + m, mask=m < limit, other=float("inf"))
            delta_M = tl.sum(grads[i].to(tl.float32) * o.to(tl.float32), 1)
            tl.store(stats + m, lse_M / -scale)
            tl.store(stats + N + m, -delta_M)
            if beside:
                p_M, ds_M = _beside(queries[i], grads[i], k_1, v_1, lse_M, delta_M, scale)
                dks += ds_M[:, None] * queries[i].to(tl.float32)
                dvs += p_M[:, None] * grads[i].to(tl.float32)
        if beside:
            dk_1 = (ds_1 * q_1 + tl.sum(dks, 0)) * natural
            _store_row(dqkv + limit * stride + width, dk_1, D)
            _store_row(dqkv + limit * stride + 2 * width, p_1 * do_1 + tl.sum(dvs, 0), D)
        tl.debug_barrier()  # all of `stats` is written
        for start in tl.range(0, limit, tile_k, num_stages=1):
            n = start + tl.arange(0, tile_k)
            k = _load(qkv + width, n, stride, limit, full_k, D)
            v = _load(qkv + 2 * width, n, stride, limit, full_k, D)
            if beside:
                q_1 = _load_row(last, D)
                do_1 = _load_row(grad + limit * width, D)
                p_N, ds_N = _beside(k, v, q_1, do_1, lse_1, delta_1, scale)
                dk = ds_N[:, None] * q_1[None, :]
                dv = p_N[:, None] * do_1[None, :]
            else:
                dk = tl.zeros([tile_k, D], tl.float32)
                dv = tl.zeros([tile_k, D], tl.float32)
            for i in tl.static_range(N // stay_q):
                # Transposed scores, which begin as what would be taken off them: no registers more.
                m = i * stay_q + tl.arange(0, stay_q)
                s = tl.broadcast_to(tl.load(stats + m)[None, :], [tile_k, stay_q])
                dp = tl.broadcast_to(tl.load(stats + N + m)[None, :], [tile_k, stay_q])
                p = tl.exp2(tl.dot(k, tl.trans(queries[i]), s) * scale)
                ds = p * tl.dot(v, tl.trans(grads[i]), dp)
                dv = tl.dot(p.to(kind), grads[i], dv)
                dk = tl.dot(ds.to(kind), queries[i], dk)
            _store(dqkv + width, n, dk * natural, stride, limit, full_k, D)
            _store(dqkv + 2 * width, n, dv, stride, limit, full_k, D)


def constants(heads: int, length: int, settings: dict[str, int]) -> dict[str, Any]:
    """What a kernel is compiled for: shapes, tiles, warps and stages."""
    beside = length > HEAD_WIDTH and (length - 1) & (length - 2) == 0
    tiled = max(64, triton.next_power_of_2(length - beside))
    sizes = {k: min(tiled, v) for k, v in settings.items() if not k.startswith("num_")}
    shapes = {"H": heads, "L": length, "D": HEAD_WIDTH, "N": tiled, "beside": int(beside)}
    return {**settings, **sizes, **shapes}


def takes(qkv: Tensor, heads: int) -> bool:
    """Whether `short_attention` computes this: half precision on a GPU, short, heads of 64."""
    if not (qkv.is_cuda or INTERPRETED) or qkv.dim() != 3 or qkv.shape[-1] % (3 * heads):
        return False
    return is_short(qkv.shape[1], qkv.shape[-1] // (3 * heads), qkv.dtype)


def short_attention(qkv: Tensor, heads: int) -> Tensor | None:
    """Self-attention without a mask of a packed projection [B, L, 3·H·D].

    Args:
        qkv: queries, keys and values of all heads.
        heads: H.

    Returns:
        [B, L, H·D], or None for what it does not take.
    """
    if not takes(qkv, heads):
        return None
    out: Tensor = _attention(qkv, heads)[0]
    return out


@torch.library.custom_op("coca_scale::short_attention", mutates_args=())
def _attention(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    out, lse = _outputs(qkv, heads)
    batch, length, _ = qkv.shape
    _forward[(batch * heads,)](qkv.contiguous(), out, lse, **constants(heads, length, FORWARD))
    return out, lse


@_attention.register_fake
def _outputs(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    batch, length, width = qkv.shape
    lse = qkv.new_empty(batch, heads, length, dtype=torch.float32)
    return qkv.new_empty(batch, length, width // 3), lse


@torch.library.custom_op("coca_scale::short_attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int
) -> Tensor:
    batch, length, _ = qkv.shape
    chosen = constants(heads, length, BACKWARD)
    stats = lse.new_empty(batch, heads, 2, chosen["N"])
    dqkv = qkv.new_empty(qkv.shape)
    _backward[(2 * batch * heads,)](
        grad_out.contiguous(), qkv.contiguous(), out, lse, stats, dqkv, **chosen
    )
    return dqkv


@_attention_backward.register_fake
def _gradient(_grad: Tensor, qkv: Tensor, _out: Tensor, _lse: Tensor, _heads: int) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    ctx.heads = inputs[1]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], *output)


def _differentiate(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, None]:
    if grad_out is None:
        return None, None
    return _attention_backward(grad_out, *ctx.saved_tensors, ctx.heads), None


_attention.register_autograd(_differentiate, setup_context=_keep)


def _heads_apart(qkv: torch.Size, heads: int) -> tuple[int, int, int, int]:
    batch, length, width = qkv
    return batch, heads, length, width // (3 * heads)


@register_flop_formula(torch.ops.coca_scale.short_attention)
def _flops(qkv: torch.Size, heads: int, **_: Any) -> int:
    count: int = sdpa_flop_count(*[_heads_apart(qkv, heads)] * 3)
    return count


@register_flop_formula(torch.ops.coca_scale.short_attention_backward)
def _backward_flops(
    _grad: torch.Size, qkv: torch.Size, _out: torch.Size, _lse: torch.Size, heads: int, **_: Any
) -> int:
    count: int = sdpa_backward_flop_count(*[_heads_apart(qkv, heads)] * 4)
    return count
