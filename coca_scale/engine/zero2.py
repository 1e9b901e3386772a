"""The optimizer step of ZeRO-1 and 2 without a look at the device, where DeepSpeed takes several.

DeepSpeed asks whether a gradient is not finite, and then whether their norm is, and so makes the
host wait for the backward pass. Here the optimizer is told on the device, as in zero3.py.

Read against 0.19.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import deepspeed.comm as dist  # and not torch's: it can log what is sent
import torch
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from torch import Tensor

from coca_scale.engine.optimizer import global_norm, only_where, shrink


def steps_unasked(config: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed's configuration asks for nothing that `take_over_step` leaves out."""
    zero = config["zero_optimization"]
    return (
        zero["stage"] in (1, 2)
        and "offload_optimizer" not in zero
        and not config["fp16"]["enabled"]  # whose loss scale the host decides on
    )


def take_over_step(optimizer: Any) -> None:
    """Let a stage-1 or 2 optimizer on its own device step as `_step` does."""
    optimizer.step = lambda closure=None: _step(optimizer, closure)


@torch.no_grad()
def _step(optimizer: Any, closure: None) -> None:
    """Clip, update, round. Where the norm is not finite nothing changes, and nobody waits."""
    assert closure is None
    optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
    groups = range(len(optimizer.bit16_groups))
    # of each gradient by itself: sums over a whole flat group lose digits
    parts = [part for group in groups for part in optimizer.averaged_gradients[group]]
    norm = global_norm(parts, optimizer.dp_process_group)
    del parts  # memory goes back group by group
    optimizer._global_grad_norm = norm
    optimizer.overflow = False  # known to the device alone
    scale = shrink(norm, optimizer.clip_grad)
    only_where(optimizer.optimizer, norm.isfinite())
    for group in groups:
        master = optimizer.single_partition_of_fp32_groups[group]
        master.grad = _own_gradient(optimizer, group).to(master.dtype).mul_(scale)
        optimizer._optimizer_step(group)
        master.grad = None
        rank = dist.get_rank(group=optimizer.real_dp_process_group[group])
        optimizer.parallel_partitioned_bit16_groups[group][rank].data.copy_(master)
    all_gather_dp_groups(
        groups_flat=optimizer.bit16_groups_flat,
        partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
        dp_process_group=optimizer.real_dp_process_group,
        start_alignment_factor=optimizer.nccl_start_alignment_factor,
        allgather_bucket_size=optimizer.allgather_bucket_size,
    )
    for group in groups:
        optimizer._update_model_bit16_weights(group)


def _own_gradient(optimizer: Any, group: int) -> Tensor:
    """Flat, this rank's part of a group's gradients; those of single parameters are let go."""
    size = int(optimizer.partition_size[group])
    flat: Tensor | None = optimizer._get_preflattened_grad_partition(group)
    if flat is None:
        flat = optimizer.flatten_dense_tensors_aligned(optimizer.averaged_gradients[group], size)
    assert flat.numel() == size
    optimizer.free_grad_in_param_list(optimizer.bit16_groups[group])
    optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None
    return flat
