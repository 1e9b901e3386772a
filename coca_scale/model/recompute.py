"""Activations that are cheaper to compute again than to keep.

A linear layer keeps its input for the backward pass. Where that input is a norm or an activation
function of something that is kept anyway, it is left out here and computed a second time: of the
17 widths per token that a transformer block keeps, 10 remain, for two norms and a GELU more.
Nothing is gathered anew under ZeRO-3, as the second computation needs no sharded parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Again = Callable[[], Tensor]


@dataclass(frozen=True)
class _Left:
    """Stands for a tensor that was not kept."""

    again: Again
    shape: torch.Size


@contextmanager
def not_keeping(value: Tensor, again: Again | None) -> Iterator[None]:
    """Inside, autograd keeps `again` instead of `value`, whatever function saves it.

    Args:
        value: what is not kept.
        again: computes it once more, bit for bit; None keeps `value` as usual.
    """
    if again is None or not torch.is_grad_enabled():
        yield
        return
    place, size = _place(value), value.numel()

    def pack(saved: Tensor) -> Tensor | _Left:
        same = _place(saved) == place and saved.numel() == size and saved.is_contiguous()
        return _Left(again, saved.shape) if same else saved

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        yield


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where its elements are, for tensors without data as well; DeepSpeed's hooks make aliases."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _unpack(saved: Tensor | _Left) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    with torch.no_grad():
        return saved.again().view(saved.shape)


class Thrifty(nn.Module):
    """A module that can leave out what is cheap to compute again.

    Attributes:
        thrifty: whether it does.
    """

    thrifty = False


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


class LayerNorm(Thrifty, nn.LayerNorm):
    """A norm in front of a linear layer."""

    def forward(self, x: Tensor) -> tuple[Tensor, Again | None]:  # type: ignore[override]
        """[*, D] → the norm, and what computes it again."""
        y = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        if not self.thrifty:
            return y, None
        # copies: under ZeRO-3 the parameters may be gone when the next layer's backward pass runs
        kept, weight, bias = x.detach(), self.weight.detach().clone(), self.bias.detach().clone()
        return y, lambda: F.layer_norm(kept, self.normalized_shape, weight, bias, self.eps)


class NormScale(Thrifty):
    """Weight and bias of a LayerNorm, for an input that is normalised once for many of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> tuple[Tensor, Again | None]:
        """Normalised [*, D] → scaled and shifted, and what computes it again."""
        y = torch.addcmul(self.bias, x, self.weight)
        if not self.thrifty:
            return y, None
        kept, weight, bias = x.detach(), self.weight.detach().clone(), self.bias.detach().clone()
        return y, lambda: torch.addcmul(bias, kept, weight)
