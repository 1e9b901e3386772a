"""torch.compile of the layers of a model, one by one, inside the hooks of a sharded engine."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from coca_scale.model.fp8 import Product
from coca_scale.model.recompute import SelectiveRecompute

# of one layer's code: training, first pass and evaluation, each with and without a mask, for every
# kind of tower, and each again when torch learns that a length varies
GRAPHS = 64
_aten = torch.ops.aten
PRODUCTS = (
    *(_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default),
    _aten._scaled_mm.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def compile_layers(layers: Iterable[nn.Module], of_images: Collection[nn.Module]) -> None:
    """Let every layer's `forward` be compiled when it is first called; layers alike share graphs.

    What a layer's parts would compute again for the backward pass, the compiled code does.
    What is outside, such as the hooks of ZeRO-3, sees the same modules as before.

    Args:
        layers: blocks and poolers.
        of_images: those that see no captions. The others are compiled for any length at once, and
            not for the first one that comes and then again.
    """
    torch._dynamo.allow_in_graph(Product)  # torch 2.11 fails inside, where lengths vary
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    # it warns on every rank that a layer must not change its input in place, and none does
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    for layer in layers:
        parts = [m for m in layer.modules() if isinstance(m, SelectiveRecompute) and m.selective]
        for part in parts:
            part.selective = False
        forward = MethodType(_keep_products, layer) if parts else layer.forward
        layer.forward = torch.compile(forward, dynamic=None if layer in of_images else True)


def _keep_products(self: nn.Module, x: Tensor, *others: Any) -> Tensor:
    """A layer of which the backward pass finds matrix products and attention, and nothing else."""
    y: Tensor = checkpoint(
        lambda x: type(self).forward(self, x, *others),
        x,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=partial(create_selective_checkpoint_contexts, _policy),
    )
    return y


def _policy(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    kept = operation in PRODUCTS or operation.namespace == "coca_scale"  # attention_kernel.py
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
