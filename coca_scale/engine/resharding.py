"""A checkpoint of one layout (ranks, ZeRO stage) in a run of another.

DeepSpeed's own converter takes the shards apart into its universal format: one folder per parameter
with `fp32.pt`, `exp_avg.pt`, `exp_avg_sq.pt`. They are loaded here and not by DeepSpeed, whose
loaders (0.19) take no other stage's format, give every parameter group the hyper-parameters of the
first, and let all groups share one step counter.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor

from coca_scale.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")


class Layout(NamedTuple):
    """How optimizer state is cut."""

    ranks: int
    zero_stage: int

    def __str__(self) -> str:
        return f"{self.ranks} ranks at ZeRO stage {self.zero_stage}"


def to_universal(state: Path, target: Path) -> None:
    """Write the universal format of DeepSpeed's folder `state` into `target`.

    Raises:
        UserError: DeepSpeed's converter failed.
    """
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(state), "--output_folder", str(target)]
    command += ["--inject_missing_state"]  # ours has no parameter patterns of model parallelism
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"{state} cannot be converted to another layout: {lines[-1]}")


def load_universal(engine: Any, folder: Path, optimizer_steps: int) -> None:
    """Fill weights and AdamW state of a new DeepSpeed engine; the same call on every rank."""
    _prepare_state(engine.optimizer, optimizer_steps)
    zero = folder / "zero"
    for key in (None, *MOMENTS):
        set_state(engine, partial(_atom, zero, key or "fp32"), key)
    _refresh_parameters(engine)


def set_state(engine: Any, full: Callable[[str], Tensor], key: str | None = None) -> None:
    """Fill this rank's part of the fp32 masters, or of the AdamW state `key`.

    Args:
        engine: DeepSpeed's, at ZeRO stage 1 to 3.
        full: the values of a whole parameter, by its name.
        key: one of MOMENTS.
    """
    for name, parameter in _trained(engine):
        if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
            part = _own_part(parameter, full(name))
            if key is None:
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, key)
        elif key is None:
            safe_set_full_fp32_param(parameter, full(name))
        else:
            safe_set_full_optimizer_state(parameter, full(name), key)


def _trained(engine: Any) -> list[tuple[str, Any]]:
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def _atom(zero: Path, key: str, name: str) -> Tensor:
    saved = torch.load(zero / name / f"{key}.pt", map_location="cpu", weights_only=True)
    tensor = saved["param"] if isinstance(saved, dict) else saved
    assert isinstance(tensor, Tensor)
    return tensor


def _refresh_parameters(engine: Any) -> None:
    """Round the masters into the parameters that the forward pass sees."""
    optimizer = engine.optimizer
    if not isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer.update_lp_params()
        return
    optimizer.checkpoint_event_prologue()  # cuts the small ones too, which are kept whole
    for _, parameter in _trained(engine):
        parameter.ds_tensor.data.copy_(safe_get_local_fp32_param(parameter))
    optimizer.checkpoint_event_epilogue()


def _own_part(parameter: Any, full: Tensor) -> Tensor:
    """This rank's part of a ZeRO-3 parameter's values `full`, flat, with zeros behind the end."""
    size = parameter.ds_tensor.ds_numel
    begin = parameter.ds_zero_partition_rank * size
    part = full.flatten()[begin : begin + size]
    return torch.nn.functional.pad(part, (0, size - part.numel()))


def _prepare_state(optimizer: Any, steps: int) -> None:
    """Give every flat master its AdamW state, which DeepSpeed makes with the first step only."""
    adam = optimizer.optimizer
    stage3 = isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3)
    masters = (
        optimizer.fp32_partitioned_groups_flat
        if stage3
        else optimizer.single_partition_of_fp32_groups
    )
    for number, master in enumerate(masters):
        state = adam.state[master]
        for key in MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(master)
        state["step"] = torch.tensor(float(steps), device=master.device)  # AdamW is fused
        if not stage3:
            _link_moments(optimizer, number, master, state)


def _link_moments(
    optimizer: DeepSpeedZeroOptimizer, group: int, master: Tensor, state: dict[str, Any]
) -> None:
    for parameter in optimizer.bit16_groups[group]:
        mapping = parameter._hp_mapping
        if mapping is not None:
            mapping.set_optim_state_fragment(master, state)
