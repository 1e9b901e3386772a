"""DeepSpeed's record of the modules of a step in which towers run apart from what follows them.

ZeRO-3 fetches weights ahead by the order in which modules were used when they were last recorded,
and begins that order anew with every forward pass of the whole model. With kept graphs the passes
of a step differ, and each kind would make it forget the other's. Here the order is of a whole step,
which is the same every time; what is used again within a step is not gathered twice then, either.

Read against 0.19. What zero3_layers.py gathers has an order of its own.
"""

from __future__ import annotations

from typing import Any

from torch import nn

AWAITED = "ds_grads_remaining"  # of a module: inputs whose gradients say that it is through


class StepTrace:
    """The order of modules over a whole step, and over graphs of the same modules."""

    def __init__(self, offload: Any, model: nn.Module) -> None:
        """Take over from DeepSpeed's `offload`, which hooks the modules of `model`."""
        offload.fwd_pre_hook.remove()
        self._begin = offload.get_param_coordinator().reset_step
        self._model = model
        self._awaited: dict[nn.Module, int] = {}

    def begin_step(self) -> None:
        """Begin the order anew. A collective, where one is being recorded."""
        self._begin()

    def left(self) -> None:
        """Modules have run whose backward pass comes after they have run again."""
        counts = {module: module.__dict__.get(AWAITED, 0) for module in self._model.modules()}
        self._awaited = {module: count for module, count in counts.items() if count > 0}

    def come_back(self) -> None:
        """One of the graphs that were left is next.

        DeepSpeed counts the gradients that a module waits for once, and not for each of its graphs:
        without this it would let go of weights of all but the first at the end of a backward pass.
        """
        for module, count in self._awaited.items():
            setattr(module, AWAITED, count)
