"""A linear layer whose products are computed in FP8, two of three (engine.fp8).

SwitchBack (Wortsman et al. 2023, arXiv:2304.13013), found on CLIP: output and gradient of the input
are products of e4m3 numbers, with a scale per row of activations and gradients and one per weight.
The gradient of the weight stays in bf16: its sums run over all tokens of a batch, where rounding
adds up until training fails, and there may be any number of tokens where FP8 wants multiples of 16.

Scales are powers of two, of what a tensor holds at that moment: dividing by them rounds nothing, so
the rows' are applied to what comes out, and the product needs no kernel but the usual one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

E4M3 = torch.float8_e4m3fn
MULTIPLE = 16  # of which both sides of a weight have to be
SMALLEST = 1e-30  # what a row's largest number is taken for at least: 0 has no scale
EXPONENT = -(1 << 23)  # the bits of an fp32 number without those of its mantissa


def takes(layer: nn.Linear) -> bool:
    """Whether a layer's products can be computed in FP8."""
    return layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0


def scaled_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `F.linear`, with rounding to 3 bits of mantissa: off by some 4 % of a product's norm.

    Args:
        x: bf16 or fp32 [*, K].
        weight: [N, K], of which nothing is kept but itself.
        bias: [N], or None.
    """
    if x.numel() == 0:  # a rank without a caption: kernels differ in whether they take no rows
        return F.linear(x, weight, bias)
    y: Tensor = Product.apply(x, weight)
    return y if bias is None else y + bias


class Product(torch.autograd.Function):
    """x Wᵀ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        rows, row_scales = _cast(x.flatten(0, -2), -1)
        small, scale = _cast(weight, None)
        y = _multiply(rows, small.t(), scale, row_scales, x.dtype, fast=True)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            rows, row_scales = _cast(grad, -1)
            small, scale = _cast(weight, None)
            # its columns one after the other, which is the only order that FP8 kernels know
            by_column = small.t().contiguous().t()
            grad_x = _multiply(rows, by_column, scale, row_scales, x.dtype, fast=False)
            grad_x = grad_x.view_as(x)
        if ctx.needs_input_grad[1]:
            grad_weight = grad.t() @ x.flatten(0, -2)
        return grad_x, grad_weight


def _cast(x: Tensor, dim: int | None) -> tuple[Tensor, Tensor]:
    """In e4m3, and fp32 scales by which that has to be multiplied; not finite where `x` is not."""
    largest = torch.linalg.vector_norm(x, torch.inf, dim, keepdim=dim is not None).float()
    factor = torch.finfo(E4M3).max / largest.clamp(min=SMALLEST)
    factor = (factor.view(torch.int32) & EXPONENT).view(torch.float32)
    return (x * factor.to(x.dtype)).to(E4M3), factor.reciprocal()


def _multiply(
    a: Tensor, b: Tensor, scale_b: Tensor, row_scales: Tensor, dtype: torch.dtype, fast: bool
) -> Tensor:
    """(a b) · scales; `fast` adds up with fewer bits, which outputs stand and gradients may not."""
    one = torch.ones_like(scale_b)
    y = torch._scaled_mm(a, b, scale_a=one, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast)
    return y * row_scales.to(dtype)
