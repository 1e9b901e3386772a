"""torch.compile of the layers of a model, one by one, inside the hooks of a sharded engine."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch._dynamo
from torch import nn

# of one layer's code: training, first pass and evaluation, each with and without a mask, for every
# kind of tower, and each again when torch learns that a length varies
GRAPHS = 64


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Let every layer's `forward` be compiled when it is first called; layers alike share graphs.

    What is outside, such as the hooks of ZeRO-3, sees the same modules as before.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    for layer in layers:
        layer.forward = torch.compile(layer.forward)
