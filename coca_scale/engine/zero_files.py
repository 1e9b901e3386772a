"""DeepSpeed's files of a checkpoint, read without its engine."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.checkpoint.constants import (
    FP32_FLAT_GROUPS,
    OPTIMIZER_STATE_DICT,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from coca_scale.errors import UserError

STATE_TAG = "state"  # of the one state that a checkpoint folder has


class Layout(NamedTuple):
    """How optimizer state is cut."""

    ranks: int
    zero_stage: int

    def __str__(self) -> str:
        return f"{self.ranks} ranks at ZeRO stage {self.zero_stage}"


def full_weights(folder: Path, lazy: bool = False) -> Any:
    """Whole fp32 parameters by name, put together from the shards of a ZeRO checkpoint.

    Needs neither a process group nor a GPU. `lazy` leaves the putting together to `.contiguous()`.
    """
    silence = io.StringIO()  # DeepSpeed prints its progress
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        return get_fp32_state_dict_from_zero_checkpoint(str(folder), STATE_TAG, lazy_mode=lazy)


def replica_weights(folder: Path) -> dict[str, Tensor]:
    """The parameters of a checkpoint of stage 0, by name."""
    file = folder / STATE_TAG / "mp_rank_00_model_states.pt"
    # DeepSpeed's own pickle of our own run; checkpoints are not an exchange format
    weights: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=False)["module"]
    return weights


def read_shard(folder: Path, rank: int) -> tuple[list[Tensor], dict[str, Any]] | None:
    """What `ZeroEngine.shard` gave for a rank, and what was written beside it; None if absent."""
    pattern = f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    file = next(iter((folder / STATE_TAG).glob(pattern)), None)
    if file is None:
        return None
    state = torch.load(file, map_location="cpu", weights_only=False)
    shards = state.pop(OPTIMIZER_STATE_DICT)
    return shards.get(FP32_FLAT_GROUPS) or shards[SINGLE_PARTITION_OF_FP32_GROUPS], state


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


def atom(zero: Path, key: str, name: str) -> Tensor:
    """A parameter in folder `zero` of the universal format: its weights `fp32`, or a moment."""
    saved = torch.load(zero / name / f"{key}.pt", map_location="cpu", weights_only=True)
    tensor = saved["param"] if isinstance(saved, dict) else saved
    assert isinstance(tensor, Tensor)
    return tensor
