"""The first weights of a run, put where the engine wants them one at a time.

At ZeRO stage 3 a rank keeps its own part of each and no more, so that no host ever holds the model,
whatever its ranks are: a weight is drawn and cut, or its part read from a file that is mapped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import Init, PartitionedParamStatus
from torch import Tensor, nn

from coca_scale.model.deferred import FirstWeights, fill_part, whole_of


def fill(
    model: nn.Module,
    first: FirstWeights | None,
    config: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give a model its weights, of which the optimizer is made only then. Local.

    Args:
        model: its parameters and buffers become others; those without data get their values now.
        first: asked for those; None where there are none.
        config: of DeepSpeed.
        dtype: of parameters that are numbers with a fraction.
        device: where they go, cut or whole.
    """
    cutting = _Cutting(config, dtype) if _cuts(config) else None
    done: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, old in module.named_parameters(recurse=False):
            if old not in done:
                kind = dtype if old.is_floating_point() else old.dtype
                if cutting is not None:
                    done[old] = cutting.cut(old, partial(fill_part, dot + name, old, first), kind)
                else:
                    whole = whole_of(dot + name, old, first, kind, device)
                    done[old] = nn.Parameter(whole, requires_grad=old.requires_grad)
            module.register_parameter(name, done[old])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, whole_of(dot + name, buffer, first, buffer.dtype, device))


def _cuts(config: dict[str, Any]) -> bool:
    """Whether weights are cut before DeepSpeed has the model.

    Not with hpZ, of whose groups of ranks it knows only then.
    """
    zero = config["zero_optimization"]
    return bool(zero["stage"] == 3) and zero.get("zero_hpz_partition_size", 1) == 1


class _Cutting:
    """DeepSpeed's own way to make a parameter one of stage 3, without its broadcast."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype) -> None:
        self._init = Init(config_dict_or_path=config, dtype=dtype)

    def cut(
        self, like: nn.Parameter, fill: Callable[[Tensor, int], None], dtype: torch.dtype
    ) -> nn.Parameter:
        """A parameter of which this rank has its part, which `fill(part, begin)` writes."""
        init, nothing = self._init, torch.empty(1, dtype=dtype, device=self._init.local_device)
        parameter: Any = nn.Parameter(nothing.expand(like.shape), requires_grad=like.requires_grad)
        init._convert_to_deepspeed_param(parameter)
        parameter.ds_numel_aligned = init._aligned_size(parameter)
        size = parameter.ds_numel_aligned // init._partition_world_size(parameter)
        device = init.local_device if parameter.ds_persist else init.remote_device
        part: Any = torch.zeros(size, dtype=dtype, device=device)
        if init.pin_memory and part.device.type == "cpu":
            part = get_accelerator().pin_memory(part)
        part.ds_numel, part.final_location = size, None
        part.status = PartitionedParamStatus.AVAILABLE
        parameter.ds_tensor = part
        begin = min(like.numel(), init._partition_rank(parameter) * size)
        fill(part[: min(like.numel() - begin, size)], begin)
        parameter.partition()  # it is, but for its status
        return parameter
