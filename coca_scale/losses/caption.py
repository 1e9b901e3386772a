"""Cross-entropy over a large vocabulary without ever holding all its logits.

The idea is that of Cut Cross-Entropy (Wijmans et al. 2024, arXiv:2411.09009) and Liger: the loss is
the last thing a head computes, so its gradients can be formed chunk by chunk in the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coca_scale.losses.matmul import wide_matmul


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk_rows: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
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

    Returns:
        A scalar sum, fp32 or wider.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(
        hidden, weight, labels, chunk_rows, label_smoothing, z_loss
    )
    return loss


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
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=wide, device=hidden.device)
        # unscaled gradients: of order 1, so they survive fp16 whatever the loss is multiplied with
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        for start in range(0, len(hidden), chunk_rows):
            chunk = slice(start, start + chunk_rows)
            x, target = hidden[chunk], labels[chunk].unsqueeze(1)
            logits = wide_matmul(x, weight.T, wide)
            lse = logits.logsumexp(1, keepdim=True)
            picked = logits.gather(1, target)
            total += (lse - (1 - label_smoothing) * picked).sum()
            if label_smoothing:
                total -= label_smoothing * logits.mean(1).sum()
            if z_loss:
                total += z_loss * lse.square().sum()
            if not (needs_hidden or needs_weight):
                continue
            grad = logits.sub_(lse).exp_()  # softmax; the logits are not needed any more
            if z_loss:
                grad *= 1 + 2 * z_loss * lse
            if label_smoothing:
                grad -= label_smoothing / logits.shape[1]
            grad.scatter_add_(1, target, torch.full_like(picked, label_smoothing - 1))
            narrow = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = narrow @ weight
            if grad_weight is not None:
                grad_weight += wide_matmul(narrow.T, x, wide)
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
        return grad_hidden, grad_weight, None, None, None, None
