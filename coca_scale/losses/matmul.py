"""Matrix products with a result, or a factor, that is wider than half precision."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b with accumulation and output in `dtype`: half precision would round the result."""
    if a.dtype == dtype:
        return a @ b
    if a.device.type != "cpu":
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def add_matmul_(into: Tensor, a: Tensor, b: Tensor) -> None:
    """into += a @ b, where `b` may be of half precision though `a` is not.

    A GPU multiplies fp32 at a tenth of the speed of half precision, so that `a` goes there in two
    pieces of the dtype of `b`: off by 2^-17 of each element at most.

    Args:
        into: [n, d], in the dtype of `a`.
        a: [n, m], fp32 or wider, elements below 4 in size.
        b: [m, d].
    """
    if b.dtype == a.dtype or a.device.type == "cpu":
        into.addmm_(a, b.to(a.dtype))
    else:
        add_in_pieces_(into, a, b)


def add_in_pieces_(into: Tensor, a: Tensor, b: Tensor) -> None:
    """`add_matmul_` as a GPU does it, for `b` of half precision."""
    pieces, factor = split(a, b.dtype)
    for piece in pieces:
        into.add_(wide_matmul(piece, b, a.dtype), alpha=1 / factor)


def split(a: Tensor, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], float]:
    """Two tensors of half precision whose sum is `factor` × `a` to 2^-17, and the factor.

    bf16 has the range of fp32. fp16 lacks small numbers, which a power of two brings into its
    range; elements below 4 stay in it. So both keep their tensor cores, and nothing is rounded that
    was in `dtype` before.
    """
    factor = 2.0**14 if dtype == torch.float16 else 1.0
    if factor != 1:
        a = a * factor
    first = a.to(dtype)
    return (first, torch.sub(a, first, out=torch.empty_like(first))), factor
