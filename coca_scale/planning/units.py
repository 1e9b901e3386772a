"""What of a model is gathered and computed one after the other: its units, for a simulated step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from coca_scale.engine.config import layers, transfers
from coca_scale.model import CoCa
from coca_scale.model.recompute import Recomputable

MAKES_ITS_GRADIENT = "caption_head"  # in the forward pass


@dataclass(frozen=True)
class Unit:
    """Weights that are gathered together, and what they compute.

    Attributes:
        part: of the model.
        block: whether it is a block or pooler, and not what its part has beside them.
        elements: of its weights.
        trained: of them, those that are not locked.
        forward_flops: of a micro-batch.
        backward_flops: of a micro-batch, with what is computed again.
    """

    part: str
    block: bool
    elements: int
    trained: int
    forward_flops: float
    backward_flops: float


def model_units(
    model: CoCa,
    twice: Mapping[str, int],
    forward_flops: Mapping[str, int],
    step_flops: int,
) -> tuple[Unit, ...]:
    """Cut a model up, in the order of its forward pass.

    What of a tower runs once more in the decoder, as the blocks of a MaMMUT do, is gathered once
    more, and there a unit of the decoder; its gradients are reduced once.

    Args:
        model: with what is recomputed set, and what is locked.
        twice: where the decoder runs through the text tower once more, what a micro-batch costs in
            the towers, by names of modules; else empty.
        forward_flops: of a micro-batch in the whole model, by names of modules as they run.
        step_flops: of forward and backward.
    """
    names = {module: name for name, module in model.named_modules()}
    blocks = {names[module]: module for module in layers(model)}
    children = dict(model.named_children())
    largest = transfers(model).bucket
    units: list[Unit] = []
    for part in (name for name in forward_flops if name in children):
        flops = (
            twice
            if part in twice
            else {name: count - twice.get(name, 0) for name, count in forward_flops.items()}
        )
        own = [name for name in forward_flops if name in blocks and _part(name) == part]
        lent = [n for n in twice if part == "decoder" and n in blocks and flops[n]]
        found = [_unit(part, True, blocks[name], flops[name]) for name in own]
        again = [_unit(part, True, blocks[name], flops[name]) for name in lent]
        idle = [replace(unit, elements=0, trained=0) for unit in again]
        rest = _without(_unit(part, False, children[part], flops[part]), [*found, *idle])
        units += [*_pieces(rest, largest), *found, *(replace(u, trained=0) for u in again)]
    scale = step_flops / sum(unit.forward_flops + unit.backward_flops for unit in units)
    return tuple(
        replace(
            unit,
            forward_flops=scale * unit.forward_flops,
            backward_flops=scale * unit.backward_flops,
        )
        for unit in units
    )


def _part(name: str) -> str:
    return name.partition(".")[0]


def _unit(part: str, block: bool, module: nn.Module, flops: int) -> Unit:
    elements = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    again = isinstance(module, Recomputable) and module.recompute
    times = 2 + again if trained and part != MAKES_ITS_GRADIENT else 0
    return Unit(part, block, elements, trained, flops, times * flops)


def _without(whole: Unit, blocks: list[Unit]) -> Unit:
    """What a part has beside its blocks."""
    flops = whole.forward_flops - sum(unit.forward_flops for unit in blocks)
    times = whole.backward_flops / whole.forward_flops if whole.forward_flops else 0
    return replace(
        whole,
        elements=whole.elements - sum(unit.elements for unit in blocks),
        trained=whole.trained - sum(unit.trained for unit in blocks),
        forward_flops=flops,
        backward_flops=times * flops,
    )


def _pieces(unit: Unit, largest: int) -> list[Unit]:
    """Towers of other libraries are gathered module by module, of at most `largest` elements."""
    count = max(1, -(-unit.elements // largest))
    sizes = [(n + 1) * unit.elements // count - n * unit.elements // count for n in range(count)]
    trained = [(n + 1) * unit.trained // count - n * unit.trained // count for n in range(count)]
    return [
        replace(
            unit,
            elements=size,
            trained=of_it,
            forward_flops=unit.forward_flops / count,
            backward_flops=unit.backward_flops / count,
        )
        for size, of_it in zip(sizes, trained, strict=True)
    ]
