"""Layers whose weights ZeRO-3 gathers whole, with two hooks of ours for DeepSpeed's six.

DeepSpeed's cost the host more than the layer itself: per call six hooks, four functions of autograd
and a walk over all parameters. What is done for a layer is the same: its weights are gathered
before they are needed, those of the next layers on the way, and let go unless they are needed again
soon; its gradients are handed on when the backward pass has left it. Layers follow each other as
they did when they were last used, which is the same on every rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NamedTuple

import deepspeed.comm as dist  # and not torch's: it can log what is sent
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from coca_scale.engine.config import LET_GO_IN_FLIGHT


class Phase(Enum):
    """What a layer is used for."""

    INFERENCE = auto()
    FORWARD = auto()
    BACKWARD = auto()


@dataclass(eq=False)
class _Layer:
    """One of them.

    Attributes:
        tower: to which it belongs; nothing is gathered ahead from one tower into another.
        parameters: all of its parameters.
        elements: of them; 0 where they are never let go in a step.
        memory: of them when they are whole; None on one rank, which has them.
        reduce: DeepSpeed's hook that takes the gradients.
        phase: of its last use.
        in_flight: what makes the weights available, once it has come.
    """

    tower: str
    parameters: list[Any]
    elements: int
    memory: _Memory | None
    reduce: Callable[..., None]
    phase: Phase = Phase.INFERENCE
    in_flight: _Gather | None = None

    def let_go(self) -> bool:
        """Of its weights; whether any was whole."""
        whole = [parameter for parameter in self.parameters if let_go(parameter)]
        if self.memory is not None:
            self.memory.free()
        return bool(whole)


class _Memory:
    """Of a layer's whole weights: always the same storage, empty while they are let go.

    Autograd keeps views of them for the backward pass, of a linear layer's weight its transpose.
    These see the memory filled again by then; if it were new each time they would hold on to it.

    Attributes:
        rows: [ranks, n] of each weight, what every rank has of it.
        weights: in their shapes.
    """

    def __init__(self, parameters: list[Any], ranks: int) -> None:
        sizes = [ranks * p.ds_tensor.numel() for p in parameters]
        self._all: Tensor = parameters[0].ds_tensor.new_empty(sum(sizes))
        parts = self._all.split(sizes)
        self.rows = [part.view(ranks, -1) for part in parts]
        pairs = zip(parts, parameters, strict=True)
        self.weights = [part[: p.ds_numel].view(p.ds_shape) for part, p in pairs]
        self.free()

    def allocate(self) -> None:
        """On the current stream."""
        storage = self._all.untyped_storage()
        if storage.nbytes() == 0:
            storage.resize_(self._all.nbytes)

    def free(self) -> None:
        """What is in it; a stream that read it has been recorded."""
        self._all.untyped_storage().resize_(0)


class _Use(NamedTuple):
    layer: _Layer
    phase: Phase


class _Gather(NamedTuple):
    """A collective under way: [ranks, n] elements of the partitions of a layer."""

    work: Any
    gathered: Tensor


class WholeLayers:
    """What a stage-3 optimizer's module does around its layers.

    Attributes:
        stream: on which weights are gathered, those outside the layers too; None on CPUs.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], optimizer: Any, zero: Mapping[str, Any]
    ) -> None:
        """Take over from DeepSpeed's hooks.

        Args:
            layers: DeepSpeed's leaf modules, by name.
            optimizer: DeepSpeed's.
            zero: section `zero_optimization` of its configuration.
        """
        self.stream = optimizer.parameter_offload._DeepSpeedZeRoOffload__allgather_stream
        self._group = optimizer.dp_process_group
        self._ranks = dist.get_world_size(self._group)
        self._ahead = zero["stage3_prefetch_bucket_size"]
        self._distance = zero["stage3_max_reuse_distance"]
        self._most = zero["stage3_max_live_parameters"]
        self._live = 0
        self._next: dict[_Use, _Use] = {}
        self._last: _Use | None = None
        self._stays: dict[_Use, bool] = {}
        self._let_go: deque[torch.cuda.Event] = deque()
        self._all_let_go: torch.cuda.Event | None = None
        self._layers = [self._take_over(name, module) for name, module in layers.items()]

    def parameters(self) -> Iterator[Any]:
        """Of all layers."""
        return (parameter for layer in self._layers for parameter in layer.parameters)

    def let_go(self) -> None:
        """Of every weight, small ones and those that are on their way included."""
        for layer in self._layers:
            self._wait(layer)
            layer.phase = Phase.INFERENCE
        whole = [layer for layer in self._layers if layer.let_go()]
        self._live = 0
        if self._ranks > 1 and whole and whole[0].parameters[0].is_cuda:
            self._all_let_go = torch.cuda.current_stream().record_event()

    def _take_over(self, name: str, module: nn.Module) -> _Layer:
        kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks)
        assert [len(hooks) for hooks in kinds] == [2, 2, 1], "DeepSpeed's hooks: see setup.py"
        (reduce,) = module._backward_hooks.values()
        for hooks in kinds:
            hooks.clear()
        parameters: list[Any] = list(module.parameters())
        stays = all(p.ds_persist for p in parameters)  # small ones come and go with the others
        elements = 0 if stays else sum(p.ds_numel for p in parameters)
        memory = _Memory(parameters, self._ranks) if self._ranks > 1 else None
        layer = _Layer(name.split(".")[0], parameters, elements, memory, reduce)

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return self._before(layer, args)

        def after(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            return self._after(layer, output)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
        return layer

    def _before(self, layer: _Layer, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Ahead of a forward pass, which may be one more inside the backward pass."""
        gradients = torch.is_grad_enabled()
        if layer.phase != Phase.BACKWARD:
            self._fetch(layer, Phase.FORWARD if gradients else Phase.INFERENCE)
        if not gradients:
            return args
        places = [n for n, x in enumerate(args) if isinstance(x, Tensor) and x.requires_grad]
        outputs = _EndBackward.apply(self, layer, *(args[n] for n in places))
        changed = list(args)
        for place, output in zip(places, outputs, strict=True):
            changed[place] = output
        return tuple(changed)

    def _after(self, layer: _Layer, output: Tensor) -> Tensor:
        if layer.phase != Phase.BACKWARD:
            self._release(layer)
        if not output.requires_grad:
            return output
        made: Tensor = _BeginBackward.apply(self, layer, output)
        return made

    def begin_backward(self, layer: _Layer) -> None:
        """The gradient of its output is there."""
        self._fetch(layer, Phase.BACKWARD)

    def end_backward(self, layer: _Layer) -> None:
        """The gradients of its inputs are there, and so are those of its weights.

        Unless they are used once more in this pass, as a MaMMUT's are: then the sum is not there
        yet, which autograd makes of all uses.
        """
        if layer.parameters[0].grad is not None:
            layer.reduce(None, None, None)
        self._release(layer)
        layer.phase = Phase.INFERENCE

    @torch.no_grad()
    def _fetch(self, layer: _Layer, phase: Phase) -> None:
        """Have its weights, and begin to gather those of the layers behind it."""
        use = _Use(layer, phase)
        layer.phase = phase
        self._learn(use)
        self._gather(layer)
        self._wait(layer)
        if self._ranks == 1:
            return
        ahead = 0
        following = self._next.get(use)
        while (
            following is not None
            and following.phase == phase
            and following.layer.tower == layer.tower
            and following.layer is not layer
            and ahead < self._ahead
            and self._live + following.layer.elements <= self._most
        ):
            ahead += following.layer.elements
            self._gather(following.layer)
            following = self._next.get(following)

    def _learn(self, use: _Use) -> None:
        last, self._last = self._last, use
        if last is not None and self._next.get(last) != use:
            self._next[last] = use
            self._stays.clear()

    def _gather(self, layer: _Layer) -> None:
        """Begin; on one rank there is nothing to wait for."""
        if layer.in_flight is not None:
            return
        missing = [p for p in layer.parameters if p.ds_status != ZeroParamStatus.AVAILABLE]
        if not missing:
            return
        self._live += layer.elements
        if self._ranks == 1:
            for parameter in missing:
                parameter.data = parameter.ds_tensor.view(parameter.ds_shape)
                parameter.ds_status = ZeroParamStatus.AVAILABLE
            return
        self._hold_back()
        with get_accelerator().stream(self.stream):
            own = torch.cat([p.ds_tensor for p in layer.parameters])
            gathered = own.new_empty(self._ranks, len(own))
            work = dist.allgather_fn(gathered.view(-1), own, group=self._group, async_op=True)
        for parameter in layer.parameters:
            parameter.ds_status = ZeroParamStatus.INFLIGHT
        layer.in_flight = _Gather(work, gathered)

    def _wait(self, layer: _Layer) -> None:
        """What was begun is there for what the device does next."""
        if layer.in_flight is None:
            return
        assert layer.memory is not None
        memory, (work, gathered) = layer.memory, layer.in_flight
        layer.in_flight = None
        sizes = [row.shape[1] for row in memory.rows]
        with get_accelerator().stream(self.stream):
            work.wait()
            memory.allocate()
            torch.split_with_sizes_copy(gathered, sizes, dim=1, out=memory.rows)
        if gathered.is_cuda:
            torch.cuda.current_stream().wait_stream(self.stream)
        for parameter, weight in zip(layer.parameters, memory.weights, strict=True):
            parameter.data = weight
            parameter.ds_status = ZeroParamStatus.AVAILABLE

    def _hold_back(self) -> None:
        """Wait where the host is far ahead: what it let go is not free before the device is."""
        if self._all_let_go is not None:
            self._all_let_go.synchronize()
            self._all_let_go = None
            self._let_go.clear()
        while self._let_go and self._let_go[0].query():
            self._let_go.popleft()
        if len(self._let_go) > LET_GO_IN_FLIGHT:
            self._let_go.popleft().synchronize()

    @torch.no_grad()
    def _release(self, layer: _Layer) -> None:
        """Let go of the weights, unless they are needed again soon."""
        if not layer.elements:
            return
        use = _Use(layer, layer.phase)
        if use not in self._stays:
            self._stays[use] = self._needed_soon(use)
        if self._stays[use] and self._live <= self._most:
            return
        if layer.let_go():
            self._live -= layer.elements
        if self._ranks > 1 and layer.parameters[0].is_cuda:
            self._let_go.append(torch.cuda.current_stream().record_event())

    def _needed_soon(self, use: _Use) -> bool:
        """Whether few enough elements are used before it is used again."""
        elements = 0
        following = self._next.get(use)
        for _ in self._next:  # an order that has just changed may lead in a circle beside it
            if following is None or following.layer is use.layer:
                return following is not None
            elements += following.layer.elements
            if elements > self._distance:
                return False
            following = self._next.get(following)
        return False


def let_go(parameter: Any) -> bool:
    """Of a whole weight; whether it was whole."""
    if parameter.ds_status != ZeroParamStatus.AVAILABLE:
        return False
    if parameter.is_cuda:  # it may come from the stream that gathers
        parameter.data.record_stream(torch.cuda.current_stream())
    parameter.data = parameter.new_empty(0)
    parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
    return True


class _EndBackward(torch.autograd.Function):
    """Its inputs; their gradients say that the backward pass has left a layer."""

    @staticmethod
    def forward(
        ctx: Any, layers: WholeLayers, layer: _Layer, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.layers, ctx.layer = layers, layer
        ctx.set_materialize_grads(False)
        return tuple(x.detach() for x in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        ctx.layers.end_backward(ctx.layer)
        return None, None, *grads


class _BeginBackward(torch.autograd.Function):
    """Its input, whose gradient says that the backward pass comes to a layer."""

    @staticmethod
    def forward(ctx: Any, layers: WholeLayers, layer: _Layer, output: Tensor) -> Tensor:
        ctx.layers, ctx.layer = layers, layer
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.layers.begin_backward(ctx.layer)
        return None, None, grads[0]
