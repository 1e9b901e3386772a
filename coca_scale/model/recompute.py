"""What the backward pass computes again instead of finding it in memory.

Selective: a linear layer keeps its input for the backward pass. Where that input is a norm or an
activation function of something that is kept anyway, it is left out here and computed a second
time: of the 17 widths per token that a transformer block keeps, 10 remain, for two norms and a GELU
more. Nothing is gathered anew under ZeRO-3, as the second computation needs no sharded parameter.

Full: of a block only the input is kept (Chen et al. 2016).

Layers do not know of it: a norm or an activation function returns an `Activation`, which carries
how it is computed again, and `Linear` takes one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coca_scale.model.fp8 import scaled_linear

Recompute = Callable[[], Tensor]


class Activation(NamedTuple):
    """A tensor, and what computes it once more, bit for bit; None where it is kept as usual.

    A tuple, so that ZeRO-3's hooks find the tensor in it.
    """

    value: Tensor
    recompute: Recompute | None


class SelectiveRecompute(nn.Module):
    """A module whose output is cheap to compute again.

    Attributes:
        selective: whether it is, so that it need not be kept.
    """

    selective = False


class LayerNorm(SelectiveRecompute, nn.LayerNorm):
    """A norm in front of a linear layer."""

    def forward(self, x: Tensor) -> Activation:  # type: ignore[override]
        """[*, D] → [*, D]."""
        y = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        if not self.selective:
            return Activation(y, None)
        # copies: under ZeRO-3 the parameters may be gone when the next layer's backward pass runs
        kept, weight, bias = x.detach(), self.weight.detach().clone(), self.bias.detach().clone()
        return Activation(
            y, lambda: F.layer_norm(kept, self.normalized_shape, weight, bias, self.eps)
        )


class RMSNorm(SelectiveRecompute, nn.RMSNorm):
    """A norm in front of a linear layer, without mean and bias (Zhang & Sennrich 2019)."""

    def forward(self, x: Tensor) -> Activation:  # type: ignore[override]
        """[*, D] → [*, D]."""
        shape, eps = self.normalized_shape, self.eps
        y = F.rms_norm(x, shape, self.weight, eps)
        if not self.selective:
            return Activation(y, None)
        kept, weight = x.detach(), self.weight.detach().clone()  # copies: as above
        return Activation(y, lambda: F.rms_norm(kept, shape, weight, eps))


class NormScale(SelectiveRecompute):
    """Weight and bias of a LayerNorm, for an input that is normalised once for many of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Activation:
        """Normalised [*, D] → scaled and shifted."""
        y = torch.addcmul(self.bias, x, self.weight)
        if not self.selective:
            return Activation(y, None)
        kept, weight, bias = x.detach(), self.weight.detach().clone(), self.bias.detach().clone()
        return Activation(y, lambda: torch.addcmul(bias, kept, weight))


class ElementWise(SelectiveRecompute):
    """An activation function between two linear layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Activation:
        """Any shape."""
        kept = x.detach()
        return Activation(
            self.function(x), (lambda: self.function(kept)) if self.selective else None
        )


class Linear(nn.Linear):
    """A linear layer that does not keep what can be computed again.

    Attributes:
        fp8: whether it is computed in FP8 while it trains (fp8.py).
    """

    fp8 = False

    def forward(self, x: Tensor | Activation) -> Tensor:
        """[*, inputs] → [*, outputs]."""
        if isinstance(x, Tensor):
            return self._product(x)
        with recompute_instead_of_saving(x):
            return self._product(x.value)

    def _product(self, x: Tensor) -> Tensor:
        if self.fp8 and self.training:
            return scaled_linear(x, self.weight, self.bias)
        return super().forward(x)


@contextmanager
def recompute_instead_of_saving(x: Activation) -> Iterator[None]:
    """Inside, autograd keeps `x.recompute` instead of `x.value`, whatever function saves it."""
    if x.recompute is None or not torch.is_grad_enabled():
        yield
        return
    recompute, storage, size = x.recompute, _storage(x.value), x.value.numel()

    def pack(saved: Tensor) -> Tensor | _NotSaved:
        same = _storage(saved) == storage and saved.numel() == size and saved.is_contiguous()
        return _NotSaved(recompute, saved.shape) if same else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        yield


@dataclass(frozen=True)
class _NotSaved:
    """Stands for a tensor that was not kept."""

    recompute: Recompute
    shape: torch.Size


def _storage(tensor: Tensor) -> tuple[int, int]:
    """Where its elements are, for tensors without data as well; DeepSpeed's hooks make aliases."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _unpack(saved: Tensor | _NotSaved) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    with torch.no_grad():
        return saved.recompute().view(saved.shape)


class Recomputable(nn.Module):
    """A module of which the backward pass can compute everything again, from its input."""

    _recompute = False

    @property
    def recompute(self) -> bool:
        """Whether it does."""
        return self._recompute

    @recompute.setter
    def recompute(self, enabled: bool) -> None:
        self._recompute = enabled
        self._switch(enabled)

    def _switch(self, enabled: bool) -> None:
        """For what is recomputed by its library."""


def run_block(block: Recomputable, x: Tensor, *args: Any) -> Tensor:
    """Apply one block; if it is to be recomputed, keep only its input for the backward pass.

    Non-reentrant with early stop: the other kinds fail or lose gradients under ZeRO-3.
    """
    if block.recompute:
        return checkpoint(block, x, *args, use_reentrant=False, preserve_rng_state=False)
    return block(x, *args)
