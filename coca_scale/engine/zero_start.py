"""The first weights of a run, put where the engine wants them one at a time.

At ZeRO stage 3 a rank keeps its own part of each and no more, so that no host ever holds the model,
whatever its ranks are: a weight is drawn and cut, or its part read from a file that is mapped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import Init
from torch import Tensor, nn

from coca_scale.model.deferred import FirstWeights, part_of


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
                part = partial(part_of, dot + name, old, first)
                kind = dtype if old.is_floating_point() else old.dtype
                if cutting is not None:
                    done[old] = cutting.cut(old, part, kind, device)
                else:
                    whole = part().view(old.shape).to(device, kind)
                    done[old] = nn.Parameter(whole, requires_grad=old.requires_grad)
            module.register_parameter(name, done[old])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, part_of(dot + name, buffer, first).view(buffer.shape).to(device))


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

    @torch.no_grad()
    def cut(
        self,
        like: nn.Parameter,
        values: Callable[[int, int], Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> nn.Parameter:
        """A parameter of which this rank has its part, from the `values` in that part alone."""
        # memory that nobody has written to is none yet, but for what becomes the part
        whole = torch.empty(like.shape, dtype=dtype, device=device)
        parameter: Any = nn.Parameter(whole, requires_grad=like.requires_grad)
        self._init._convert_to_deepspeed_param(parameter)
        parameter.partition()
        part, size = parameter.ds_tensor, parameter.ds_tensor.ds_numel
        begin = min(like.numel(), parameter.ds_zero_partition_rank * size)
        end = min(like.numel(), begin + size)
        part[: end - begin].copy_(values(begin, end))
        part[end - begin :].zero_()
        return parameter
