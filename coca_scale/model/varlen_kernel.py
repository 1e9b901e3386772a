"""Attention over rows of several lengths in Triton; the operations are those of varlen.py.

A program has one head of one caption, and nothing is summed over programs: results do not depend
on the order in which a GPU works. Tiles go as far as the caption does. Backward, a program first
finds the gradients of its queries, while keys pass, then those of its keys and values, while
queries pass: scores are computed twice, and no sum outlives a tile (Dao 2023, FlashAttention-2).

Letters: Q rows of a tile of queries, K of one of keys, D head dimension, P the power of two that
tiles fill it up to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
TILES = {"Q": 64, "K": 64, "num_stages": 2}


@triton.jit
def _load(  # type: ignore[no-untyped-def]
    matrix, rows, limit, stride: tl.constexpr, D: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """Rows [*, P] of a matrix, zero from row `limit` and column D on."""
    columns = tl.arange(0, P)[None, :]
    mask = rows[:, None] < limit
    if P > D:
        mask = mask & (columns < D)
    return tl.load(matrix + rows[:, None] * stride + columns, mask=mask, other=0.0)


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    matrix, rows, x, limit, stride: tl.constexpr, D: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """Write rows [*, P] of a matrix up to row `limit` and column D."""
    columns = tl.arange(0, P)[None, :]
    mask = rows[:, None] < limit
    if P > D:
        mask = mask & (columns < D)
    tl.store(matrix + rows[:, None] * stride + columns, x.to(matrix.dtype.element_ty), mask=mask)


@triton.jit
def _place(starts, H: tl.constexpr, S: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a program: its head, its first query and their number, its first key and their number."""
    caption = tl.program_id(0) // H
    head = tl.program_id(0) % H
    first = tl.load(starts + caption)
    length = tl.load(starts + caption + 1) - first
    if S > 0:
        return head, first.to(tl.int64), length, caption.to(tl.int64) * S, S
    else:
        return head, first.to(tl.int64), length, first.to(tl.int64), length


@triton.jit
def _visible(  # type: ignore[no-untyped-def]
    seen, queries, keys, keys_limit, causal: tl.constexpr, masked: tl.constexpr
):  # fmt: skip
    """Which keys which queries see; one of the two has a dimension of 1 in front or behind."""
    found = keys < keys_limit
    if masked:
        found = found & (tl.load(seen + keys, mask=found, other=0) != 0)
    if causal:
        found = found & (keys <= queries)
    return found


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    q, k, v, starts, seen, out, lse, N, H: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    S: tl.constexpr, masked: tl.constexpr, causal: tl.constexpr, stride_q: tl.constexpr,
    stride_kv: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Writes also the logarithms, to the base 2, of the sums of exponentials of scores."""
    scale: tl.constexpr = LOG2_E * D**-0.5
    head, first, length, first_k, length_k = _place(starts, H, S)
    q += first * stride_q + head * D
    k += first_k * stride_kv + head * D
    v += first_k * stride_kv + head * D
    seen += first_k
    out += first * (H * D) + head * D
    lse += head.to(tl.int64) * N + first
    for start in range(0, length, Q):
        m = start + tl.arange(0, Q)
        queries = _load(q, m, length, stride_q, D, P)
        largest = tl.full([Q], -float("inf"), tl.float32)
        total = tl.zeros([Q], tl.float32)
        y = tl.zeros([Q, P], tl.float32)
        end = tl.minimum(start + Q, length_k) if causal else length_k
        for start_k in range(0, end, K):
            n = start_k + tl.arange(0, K)
            keys = _load(k, n, length_k, stride_kv, D, P)
            values = _load(v, n, length_k, stride_kv, D, P)
            s = tl.dot(queries, tl.trans(keys)) * scale
            visible = _visible(seen, m[:, None], n[None, :], length_k, causal, masked)
            s = tl.where(visible, s, -float("inf"))
            higher = tl.maximum(largest, tl.max(s, 1))
            finite = tl.where(higher == -float("inf"), 0.0, higher)  # nothing seen so far
            p = tl.exp2(s - finite[:, None])
            fade = tl.exp2(largest - finite)
            total = total * fade + tl.sum(p, 1)
            y = tl.dot(p.to(queries.dtype), values, y * fade[:, None])
            largest = higher
        some = total > 0
        _store(out, m, y / tl.where(some, total, 1.0)[:, None], length, H * D, D, P)
        sums = tl.where(some, largest + tl.log2(total), float("inf"))
        tl.store(lse + m, sums, mask=m < length)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad, q, k, v, out, lse, delta, starts, seen, dq, dk, dv, N, H: tl.constexpr, D: tl.constexpr,
    P: tl.constexpr, S: tl.constexpr, masked: tl.constexpr, causal: tl.constexpr,
    stride_q: tl.constexpr, stride_kv: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """`delta` [H, N] is memory for what a program needs of its own rows again."""
    natural: tl.constexpr = D**-0.5
    scale: tl.constexpr = LOG2_E * natural
    kind = dq.dtype.element_ty
    head, first, length, first_k, length_k = _place(starts, H, S)
    q += first * stride_q + head * D
    dq += first * stride_q + head * D
    k += first_k * stride_kv + head * D
    dk += first_k * stride_kv + head * D
    v += first_k * stride_kv + head * D
    dv += first_k * stride_kv + head * D
    seen += first_k
    out += first * (H * D) + head * D
    grad += first * (H * D) + head * D
    lse += head.to(tl.int64) * N + first
    delta += head.to(tl.int64) * N + first
    for start in range(0, length, Q):
        m = start + tl.arange(0, Q)
        queries = _load(q, m, length, stride_q, D, P)
        do = _load(grad, m, length, H * D, D, P)
        o = _load(out, m, length, H * D, D, P)
        delta_Q = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
        tl.store(delta + m, delta_Q, mask=m < length)
        lse_Q = tl.load(lse + m, mask=m < length, other=float("inf"))
        dqueries = tl.zeros([Q, P], tl.float32)
        end = tl.minimum(start + Q, length_k) if causal else length_k
        for start_k in range(0, end, K):
            n = start_k + tl.arange(0, K)
            keys = _load(k, n, length_k, stride_kv, D, P)
            values = _load(v, n, length_k, stride_kv, D, P)
            s = tl.dot(queries, tl.trans(keys))
            visible = _visible(seen, m[:, None], n[None, :], length_k, causal, masked)
            p = tl.where(visible, tl.exp2(s * scale - lse_Q[:, None]), 0.0)
            ds = p * (tl.dot(do, tl.trans(values)) - delta_Q[:, None])
            dqueries = tl.dot(ds.to(kind), keys, dqueries)
        _store(dq, m, dqueries * natural, length, stride_q, D, P)
    tl.debug_barrier()  # all of `delta` is written
    for start_k in range(0, length_k, K):
        n = start_k + tl.arange(0, K)
        keys = _load(k, n, length_k, stride_kv, D, P)
        values = _load(v, n, length_k, stride_kv, D, P)
        dkeys = tl.zeros([K, P], tl.float32)
        dvalues = tl.zeros([K, P], tl.float32)
        begin = start_k // Q * Q if causal else 0
        for start in range(begin, length, Q):
            m = start + tl.arange(0, Q)
            queries = _load(q, m, length, stride_q, D, P)
            do = _load(grad, m, length, H * D, D, P)
            lse_Q = tl.load(lse + m, mask=m < length, other=float("inf"))
            delta_Q = tl.load(delta + m, mask=m < length, other=0.0)
            s = tl.dot(keys, tl.trans(queries))
            visible = _visible(seen, m[None, :], n[:, None], length_k, causal, masked)
            p = tl.where(visible, tl.exp2(s * scale - lse_Q[None, :]), 0.0)
            ds = p * (tl.dot(values, tl.trans(do)) - delta_Q[None, :])
            dvalues = tl.dot(p.to(kind), do, dvalues)
            dkeys = tl.dot(ds.to(kind), queries, dkeys)
        _store(dk, n, dkeys * natural, length_k, stride_kv, D, P)
        _store(dv, n, dvalues, length_k, stride_kv, D, P)


def constants(
    heads: int,
    head_width: int,
    context: int | None,
    masked: bool,
    causal: bool,
    strides: tuple[int, int],
) -> dict[str, Any]:
    """What a kernel is compiled for: shapes, tiles, warps and stages."""
    filled = max(16, triton.next_power_of_2(head_width))
    shapes = {"H": heads, "D": head_width, "P": filled, "S": context or 0}
    shapes |= {"masked": masked, "causal": causal}
    warps = 4 if filled <= 64 else 8  # where the registers of 4 do not hold a tile's sums
    chosen = {"stride_q": strides[0], "stride_kv": strides[1], "num_warps": warps, **TILES}
    return {**shapes, **chosen}


def forward(
    qkv: Sequence[Tensor],
    starts: Tensor,
    seen: Tensor | None,
    out: Tensor,
    lse: Tensor,
    context: int | None,
    causal: bool,
) -> None:
    """Fill outputs.

    Args:
        qkv: queries [N, W], keys and values, the two with one stride between rows.
        starts: int32 [B + 1], the first row of every caption, and N.
        seen: bool [N], which keys may be seen, or None.
        out: [N, W].
        lse: fp32 [H, N].
        context: S, rows that keys and values have for every caption; None where they have those of
            the queries.
        causal: whether a query sees no key after it.
    """
    programs, chosen = _chosen(qkv, starts, seen, lse, context, causal)
    seen = starts if seen is None else seen  # not read
    _forward[programs](*qkv, starts, seen, out, lse, len(out), **chosen)


def backward(
    grad: Tensor,
    qkv: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    seen: Tensor | None,
    grads: Sequence[Tensor],
    context: int | None,
    causal: bool,
) -> None:
    """Fill the gradients of queries, keys and values, which lie as these do.

    Args:
        grad: [N, W], contiguous, of `out`.
        qkv: as above, and so are the others.
        out: as above.
        lse: as above.
        starts: as above.
        seen: as above.
        grads: of `qkv`.
        context: as above.
        causal: as above.
    """
    programs, chosen = _chosen(qkv, starts, seen, lse, context, causal)
    seen = starts if seen is None else seen
    delta = lse.new_empty(lse.shape)
    _backward[programs](grad, *qkv, out, lse, delta, starts, seen, *grads, len(out), **chosen)


def _chosen(
    qkv: Sequence[Tensor],
    starts: Tensor,
    seen: Tensor | None,
    lse: Tensor,
    context: int | None,
    causal: bool,
) -> tuple[tuple[int], dict[str, Any]]:
    heads = len(lse)
    strides = qkv[0].stride(0), qkv[1].stride(0)
    width = qkv[0].shape[1] // heads
    chosen = constants(heads, width, context, seen is not None, causal, strides)
    return ((len(starts) - 1) * heads,), chosen
