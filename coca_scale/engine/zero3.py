"""ZeRO-3 for as many parameters at a time as there are, where DeepSpeed takes one after the other.

A GPU computes L/14's step faster than the host gets through DeepSpeed's loops over its 790
parameters: for each of them a copy of the gradient into a bucket, slices of it for all ranks, a
copy into its partition, a cast and a norm, a release. Replaced here, on one optimizer object and
with the same result, is what is done per parameter; for modules see zero3_layers.py.

Read against 0.19: names with `_DeepSpeedZeroOptimizer_Stage3` are those of its private methods.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import deepspeed.comm as dist  # and not torch's: it can log what is sent
import deepspeed.utils.nvtx
import torch
import torch.nn.functional as F
from torch import Tensor

from coca_scale.engine.config import BUCKETS_IN_FLIGHT
from coca_scale.engine.optimizer import global_norm, only_where, shrink
from coca_scale.engine.zero3_layers import WholeLayers, let_go

PRIVATE = "_DeepSpeedZeroOptimizer_Stage3"
COORDINATOR = "_PartitionedParameterCoordinator"
FETCHES_IN_FLIGHT = 64


class ManyAtOnce:
    """What a stage-3 optimizer on its own device does to gradients and weights of a step."""

    def __init__(self, optimizer: Any, layers: WholeLayers) -> None:
        """Take over, where `many_at_once`."""
        deepspeed.utils.nvtx.enable_nvtx = False  # a range around every one of 5,000 calls
        self._optimizer = optimizer
        self._parameters = [p for group in optimizer.fp16_groups for p in group]
        self._layers = layers
        in_layers = {id(parameter) for parameter in layers.parameters()}
        self._others = [p for p in optimizer.module.parameters() if id(p) not in in_layers]
        self._partitions = getattr(optimizer, f"{PRIVATE}__param_id_to_grad_partition")
        self._group = optimizer.dp_process_group
        self._ranks = dist.get_world_size(self._group)
        self._stream = optimizer.reduce_and_partition_stream
        self._waiting: list[Any] = []
        self._elements = 0
        self._in_flight: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()
        replaced: dict[str, Callable[..., Any]] = {
            "reduce_ready_partitions_and_remove_grads": self._add,
            f"{PRIVATE}__reduce_and_partition_ipg_grads": lambda _: self._reduce(),
            "independent_gradient_partition_epilogue": self._finish,
            "_get_norm_groups": lambda: [self._norm()],
            "_partition_all_parameters": self._release,
        }
        if optimizer.dtype != torch.float16:  # whose loss scale the host decides on
            replaced["step"] = self._step
        coordinator = optimizer.parameter_offload.get_param_coordinator()
        # of the few weights outside the layers; at DeepSpeed's 2 the host would wait for a step
        setattr(coordinator, f"{COORDINATOR}__max_ongoing_fetch_events", FETCHES_IN_FLIGHT)
        for name, method in replaced.items():
            assert hasattr(optimizer, name), f"DeepSpeed's ZeRO-3 has no {name}: see setup.py"
            setattr(optimizer, name, method)

    def _add(self, parameter: Any) -> None:
        """The gradient of a parameter is complete."""
        if self._elements + parameter.ds_numel > self._optimizer.reduce_bucket_size:
            self._reduce()
        self._waiting.append(parameter)
        self._elements += parameter.ds_numel

    @torch.no_grad()
    def _reduce(self) -> None:
        """Average over ranks, and keep this rank's part of every gradient that waits."""
        if not self._waiting:
            return
        gradients = [parameter.grad for parameter in self._waiting]
        targets = [self._partitions[parameter.ds_id] for parameter in self._waiting]
        for parameter in self._waiting:
            parameter.grad = None
        self._waiting.clear()
        self._elements = 0
        if self._ranks == 1 or not gradients[0].is_cuda:
            self._keep(targets, gradients)
            return
        self._hold_back()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._keep(targets, gradients)
        # kept until the device is through: cheaper than telling the allocator of each of them
        self._in_flight.append((self._stream.record_event(), gradients))

    def _keep(self, targets: list[Tensor], gradients: list[Tensor]) -> None:
        parts = self._own_parts(gradients)
        if self._optimizer.micro_step_id == 0:
            torch._foreach_copy_(targets, parts)
        else:
            torch._foreach_add_(targets, [part.to(targets[0].dtype) for part in parts])

    def _own_parts(self, gradients: list[Tensor]) -> list[Tensor]:
        """Flat, of each the part that this rank keeps, padded with zeros; averaged over ranks."""
        if self._ranks == 1:
            return [gradient.view(-1) for gradient in gradients]
        rows = [_rows(gradient, self._ranks) for gradient in gradients]
        sizes = [part.shape[1] for part in rows]
        whole = torch.cat(rows, dim=1).div_(self._ranks)
        own = whole.new_empty(whole.shape[1])
        dist.reduce_scatter_fn(own, whole.view(-1), group=self._group)
        return list(own.split(sizes))

    def _hold_back(self) -> None:
        """Wait for older buckets: what they hold is not free before they are through."""
        while self._in_flight and self._in_flight[0][0].query():
            self._in_flight.popleft()
        if len(self._in_flight) >= BUCKETS_IN_FLIGHT:
            self._in_flight.popleft()[0].synchronize()

    def _finish(self) -> None:
        """The backward pass of a micro-batch is through. DeepSpeed makes the host wait here."""
        self._reduce()
        if self._parameters[0].is_cuda:  # DeepSpeed looks for overflow on the other one
            torch.cuda.current_stream().wait_stream(self._stream)
            self._stream.wait_stream(torch.cuda.current_stream())
            self._in_flight.clear()
        optimizer = self._optimizer
        optimizer.averaged_gradients = {
            number: [self._partitions[parameter.ds_id] for parameter in group]
            for number, group in enumerate(optimizer.fp16_groups)
        }
        optimizer._epilogue_ran_this_backward = True

    def order_streams(self) -> None:
        """Weights are gathered on a stream of their own, and not before they are updated.

        On one rank nothing is, but DeepSpeed makes the host wait for that stream.
        """
        if self._ranks > 1 and self._parameters[0].is_cuda:
            self._layers.stream.wait_stream(torch.cuda.current_stream())

    @torch.no_grad()
    def _step(self, closure: None = None) -> None:
        """Clip, update, round. Where the norm is not finite nothing changes, and nobody waits."""
        assert closure is None
        optimizer = self._optimizer
        optimizer._pre_step()
        if self._ranks > 1:  # on a single one, what is changed is the whole weight
            self._release()
        norm = self._norm()
        optimizer._global_grad_norm = norm
        optimizer.overflow = False  # known to the device alone
        scale = shrink(norm, optimizer.clip_grad)
        only_where(optimizer.optimizer, norm.isfinite())
        gradients = optimizer.grad_partitions_flat_buffer.split(
            optimizer.fp16_partitioned_groups_flat_numel
        )
        for number, gradient in enumerate(gradients):
            master = optimizer.fp32_partitioned_groups_flat[number]
            master.grad = gradient.to(master.dtype).mul_(scale)
            optimizer._optimizer_step(number)
            master.grad = None
            optimizer.fp16_partitioned_groups_flat[number].copy_(master)
        # DeepSpeed would gather small weights here and wait; they come with what they belong to

    @torch.no_grad()
    def _norm(self) -> Tensor:
        """Of all gradients on all ranks."""
        gradients = [self._partitions[parameter.ds_id] for parameter in self._parameters]
        return global_norm(gradients, self._group)

    @torch.no_grad()
    def _release(self) -> None:
        """Let go of every weight that is whole, before it is changed or saved."""
        coordinator = self._optimizer.parameter_offload.get_param_coordinator()
        in_flight = getattr(coordinator, f"{COORDINATOR}__inflight_param_registry")
        self._layers.let_go()
        released = 0
        for parameter in self._others:
            if in_flight and parameter in in_flight:
                in_flight.pop(parameter).wait()
            parameter.ds_active_sub_modules.clear()
            if let_go(parameter):
                released += parameter.ds_numel
        name = f"{COORDINATOR}__n_available_params"
        setattr(coordinator, name, getattr(coordinator, name) - released)


def _rows(gradient: Tensor, ranks: int) -> Tensor:
    """[ranks, n]: what each rank keeps of a gradient, with zeros behind the end."""
    flat = gradient.reshape(-1)
    size = -(-flat.numel() // ranks)
    missing = ranks * size - flat.numel()
    return (F.pad(flat, (0, missing)) if missing else flat).view(ranks, size)
