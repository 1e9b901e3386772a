"""Softmax cross-entropy and its gradient in one Triton kernel.

Logits are read twice and the gradient is written once, where torch passes over them eight times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    logits, labels, grads, losses, vocabulary, smoothing, z_loss, with_grads: tl.constexpr,
    columns: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    offsets = tl.arange(0, columns)
    largest = -float("inf")
    scaled_sum = 0.0
    plain_sum = 0.0
    for start in range(0, vocabulary, columns):
        inside = start + offsets < vocabulary
        x = tl.load(logits + start + offsets, mask=inside, other=-float("inf"))
        higher = tl.maximum(largest, tl.max(x, 0))
        scaled_sum = scaled_sum * tl.exp(largest - higher) + tl.sum(tl.exp(x - higher), 0)
        plain_sum += tl.sum(tl.where(inside, x, 0.0), 0)
        largest = higher
    lse = largest + tl.log(scaled_sum)
    label = tl.load(labels + row)
    loss = lse - (1 - smoothing) * tl.load(logits + label)
    loss += z_loss * lse * lse - smoothing * plain_sum / vocabulary
    tl.store(losses + row, loss)
    if with_grads:
        grads += row * vocabulary
        factor = 1 + 2 * z_loss * lse
        for start in range(0, vocabulary, columns):
            inside = start + offsets < vocabulary
            x = tl.load(logits + start + offsets, mask=inside, other=-float("inf"))
            grad = tl.exp(x - lse) * factor - smoothing / vocabulary
            grad = tl.where(start + offsets == label, grad - (1 - smoothing), grad)
            tl.store(grads + start + offsets, grad.to(grads.dtype.element_ty), mask=inside)


def softmax_and_gradient(
    logits: Tensor,
    labels: Tensor,
    smoothing: float,
    z_loss: float,
    gradient_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """As `caption.softmax_and_gradient`, for contiguous fp32 logits [n, V] on a GPU."""
    rows, vocabulary = logits.shape
    losses = logits.new_empty(rows)
    grads = None if gradient_dtype is None else torch.empty_like(logits, dtype=gradient_dtype)
    _kernel[(rows,)](
        logits,
        labels,
        logits if grads is None else grads,
        losses,
        vocabulary,
        smoothing,
        z_loss,
        with_grads=grads is not None,
        columns=min(COLUMNS, triton.next_power_of_2(vocabulary)),
        num_warps=8,
    )
    return losses.sum(), grads
