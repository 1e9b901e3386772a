"""Weights that do not train, cut over the ranks: a block is whole only while it computes.

As ZeRO-3 does it for what trains, without all that gradients ask of that. The block that comes next
is gathered while one computes; which that is, the first pass shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from coca_scale.engine.config import layers
from coca_scale.engine.world import World

MOST_PARTS = 32  # of a model of another library, in modules of about that share of it
LEAST_ELEMENTS = 2**14  # of a module that is worth a collective


class CutLayers:
    """The blocks of a model, each of which every rank has a part of."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, world: World) -> None:
        """Cut up the blocks of `model`, which is the same on every rank, on the host.

        Weights outside of them stay as they are. The device gets this rank's parts, in `dtype`.
        """
        assert world.gather_group is not None
        own = set(layers(model))
        most = sum(p.numel() for p in model.parameters()) // MOST_PARTS
        self._layers = [_Layer(module, dtype, world) for module in _blocks_of(model, own, most)]
        self._before: _Layer | None = None
        for layer in self._layers:
            layer.module.register_forward_pre_hook(self._enter(layer))
            layer.module.register_forward_hook(lambda *_, layer=layer: layer.let_go())

    @property
    def resident_bytes(self) -> int:
        """Of this rank's parts."""
        return sum(layer.part.nbytes for layer in self._layers)

    def begin(self) -> None:
        """A forward pass is next."""
        self._before = None

    def _enter(self, layer: _Layer) -> Any:
        def hook(*_: Any) -> None:
            if self._before is not None:
                self._before.following = layer
            self._before = layer
            layer.start()
            layer.finish()
            if layer.following is not None:  # before this one computes: it travels meanwhile
                layer.following.start()

        return hook


class _Layer:
    """A block.

    Attributes:
        module: the block.
        part: this rank's, flat.
        following: what comes behind it in a forward pass, once that is known.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, world: World) -> None:
        self.module = module
        self.following: _Layer | None = None
        self._parameters = list(module.parameters())
        self._shapes = [p.shape for p in self._parameters]
        self._group = world.gather_group
        flat = torch.cat([p.detach().flatten().to(dtype) for p in self._parameters])
        size = -(-len(flat) // world.size)
        self._whole = size * world.size
        flat = torch.nn.functional.pad(flat, (0, self._whole - len(flat)))
        self.part = flat[world.rank * size :][:size].to(world.device, copy=True)
        self._nothing = self.part.new_empty(0)
        self._gathered: tuple[Tensor, Any] | None = None
        self.let_go()

    def start(self) -> None:
        """Begin to gather it, unless that was done."""
        if self._gathered is None:
            whole = self.part.new_empty(self._whole)
            work = dist.all_gather_into_tensor(whole, self.part, group=self._group, async_op=True)
            self._gathered = whole, work

    def finish(self) -> None:
        """Wait until it is there, and let its parameters be that."""
        assert self._gathered is not None
        whole, work = self._gathered
        work.wait()
        sizes = [shape.numel() for shape in self._shapes]
        pieces = whole[: sum(sizes)].split(sizes)
        for parameter, piece, shape in zip(self._parameters, pieces, self._shapes, strict=True):
            parameter.data = piece.view(shape)

    def let_go(self) -> None:
        """It has computed."""
        self._gathered = None
        for parameter in self._parameters:
            parameter.data = self._nothing


def _blocks_of(module: nn.Module, own: set[nn.Module], most: int) -> Iterator[nn.Module]:
    """Blocks of this package, and of other modules those with at most `most` weights."""
    size = sum(p.numel() for p in module.parameters())
    if size < LEAST_ELEMENTS:
        return
    children = list(module.children())
    if module in own or size <= most or not children:
        yield module
        return
    for child in children:
        yield from _blocks_of(child, own, most)
