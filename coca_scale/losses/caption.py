"""Cross-entropy over a large vocabulary without ever holding all its logits.

The idea is that of Cut Cross-Entropy (Wijmans et al. 2024, arXiv:2411.09009) and Liger: the loss is
the last thing a head computes, so its gradients can be formed chunk by chunk in the forward pass.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from coca_scale.losses.matmul import wide_matmul

LABEL = "caption loss (per token)"
Kernel = Literal["torch", "triton"]


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk_rows: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    kernel: Kernel = "torch",
) -> Tensor:
    """Summed cross-entropy of `hidden @ weight.T` against `labels`.

    Per row with logits x, target y and log-sum-exp l the loss is
    `l − (1−ε)·x[y] − ε·mean(x) + z·l²` (ε: `label_smoothing`, z: `z_loss`).

    At most `chunk_rows` rows of logits exist at a time, in fp32 (or the dtype of `hidden` if that
    is wider), and no tensor of vocabulary size is kept for the backward pass but the gradient of
    `weight`. The backward pass does not read `weight`: a sharded engine need not gather it again.

    Args:
        hidden: [N, D], of the rows that count; there may be none.
        weight: [V, D].
        labels: [N] integer ids in [0, V).
        chunk_rows: rows per chunk.
        label_smoothing: mass spread evenly over the vocabulary.
        z_loss: factor of the squared log partition function.
        kernel: what makes gradients of logits; "triton" is meant for GPUs, and is torch elsewhere.

    Returns:
        A scalar sum, fp32 or wider.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(
        hidden, weight, labels, chunk_rows, label_smoothing, z_loss, kernel
    )
    return loss


def softmax_and_gradient(
    logits: Tensor,
    labels: Tensor,
    smoothing: float,
    z_loss: float,
    gradient_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """Summed loss of a chunk and its gradient.

    Args:
        logits: [n, V]; what is in them is lost.
        labels: [n].
        smoothing: mass spread evenly over the vocabulary.
        z_loss: factor of the squared log partition function.
        gradient_dtype: of the gradient, None for no gradient.

    Returns:
        A scalar, and [n, V] or None.
    """
    target = labels.unsqueeze(1)
    lse = logits.logsumexp(1, keepdim=True)
    picked = logits.gather(1, target)
    total = (lse - (1 - smoothing) * picked).sum()
    if smoothing:
        total -= smoothing * logits.mean(1).sum()
    if z_loss:
        total += z_loss * lse.square().sum()
    if gradient_dtype is None:
        return total, None
    grad = logits.sub_(lse).exp_()  # softmax
    if z_loss:
        grad *= 1 + 2 * z_loss * lse
    if smoothing:
        grad -= smoothing / logits.shape[1]
    grad.scatter_add_(1, target, torch.full_like(picked, smoothing - 1))
    return total, grad.to(gradient_dtype)


def _implementation(kernel: Kernel, logits: Tensor) -> Callable[..., tuple[Tensor, Tensor | None]]:
    fits = logits.dtype == torch.float32 and (logits.is_cuda or "TRITON_INTERPRET" in os.environ)
    if kernel == "triton" and fits and find_spec("triton") is not None:
        from coca_scale.losses import softmax_kernel

        return softmax_kernel.softmax_and_gradient
    return softmax_and_gradient


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk_rows: int,
        label_smoothing: float,
        z_loss: float,
        kernel: Kernel,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needed = ctx.needs_input_grad[:2]
        grad_dtype = hidden.dtype if any(needed) else None
        total = torch.zeros((), dtype=wide, device=hidden.device)
        # unscaled gradients: of order 1, so they survive fp16 whatever the loss is multiplied with
        grad_hidden = torch.empty_like(hidden) if needed[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        for start in range(0, len(hidden), chunk_rows):
            chunk = slice(start, start + chunk_rows)
            x = hidden[chunk]
            logits = wide_matmul(x, weight.T, wide)
            loss, grad = _implementation(kernel, logits)(
                logits, labels[chunk], label_smoothing, z_loss, grad_dtype
            )
            total += loss
            if grad is not None and grad_hidden is not None:
                grad_hidden[chunk] = grad @ weight
            if grad is not None and grad_weight is not None:
                grad_weight += wide_matmul(grad.T, x, wide)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = grad_outputs
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * upstream).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * upstream).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None
