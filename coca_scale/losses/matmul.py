"""A matrix product with a wider result."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b with accumulation and output in `dtype`: half precision would round the result."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)
