"""DeepSpeed's files of a checkpoint, read without its engine and without running what is in them.

DeepSpeed itself unpickles anything. Whatever reads its files, here, in its engine and in its
converter, does so under `tensors_alone`: tensors, plain data, and the few classes of `HARMLESS`.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from deepspeed.checkpoint import ds_to_universal
from deepspeed.checkpoint.constants import (
    FP32_FLAT_GROUPS,
    OPTIMIZER_STATE_DICT,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from coca_scale.errors import UserError
from coca_scale.model.pickles import inside, read_pickle, refusal, tensors_alone

STATE_TAG = "state"  # of the one state that a checkpoint folder has
# that DeepSpeed writes: their constructors store what they are given
HARMLESS = (DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address)


class Layout(NamedTuple):
    """How optimizer state is cut."""

    ranks: int
    zero_stage: int

    def __str__(self) -> str:
        return f"{self.ranks} ranks at ZeRO stage {self.zero_stage}"


def look_through(state: Path, share: int = 0, shares: int = 1) -> None:
    """See that every `shares`-th file of DeepSpeed's folder, from number `share` on, is only data.

    Raises:
        UserError: a file that is damaged or holds something else, or a name that is a path: the
            converter makes folders of names.
    """
    for file in sorted(state.glob("*.pt"))[share::shares]:
        for value in inside(read_pickle(file, HARMLESS, mapped=True)):
            names = value if isinstance(value, dict) else ()
            if paths := [name for name in names if "/" in str(name)]:
                raise UserError(f"{file}: {paths[0]!r} in it is a path, not a name")


def full_weights(folder: Path, lazy: bool = False) -> Any:
    """Whole fp32 parameters by name, put together from the shards of a ZeRO checkpoint.

    Needs neither a process group nor a GPU. `lazy` leaves the putting together to `.contiguous()`.

    Raises:
        UserError: files that are damaged, or hold something else.
    """
    look_through(folder / STATE_TAG)
    silence = io.StringIO()  # DeepSpeed prints its progress
    with (
        contextlib.redirect_stdout(silence),
        contextlib.redirect_stderr(silence),
        _deepspeed_reads(folder),
    ):
        return get_fp32_state_dict_from_zero_checkpoint(str(folder), STATE_TAG, lazy_mode=lazy)


def replica_weights(folder: Path) -> dict[str, Tensor]:
    """The parameters of a checkpoint of stage 0, by name.

    Raises:
        UserError: damaged, or holding something else.
    """
    file = folder / STATE_TAG / "mp_rank_00_model_states.pt"
    with _deepspeed_reads(folder):
        weights: dict[str, Tensor] = read_pickle(file, HARMLESS)["module"]
        assert all(isinstance(tensor, Tensor) for tensor in weights.values())
    return weights


def read_shard(folder: Path, rank: int) -> tuple[list[Tensor], dict[str, Any]] | None:
    """What `ZeroEngine.shard` gave for a rank, and what was written beside it; None if absent."""
    pattern = f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    file = next(iter((folder / STATE_TAG).glob(pattern)), None)
    if file is None:
        return None
    state = read_pickle(file, HARMLESS)
    shards = state.pop(OPTIMIZER_STATE_DICT)
    return shards.get(FP32_FLAT_GROUPS) or shards[SINGLE_PARTITION_OF_FP32_GROUPS], state


def to_universal(state: Path, target: Path) -> None:
    """Write the universal format of DeepSpeed's folder `state` into `target`.

    Raises:
        UserError: DeepSpeed's converter failed, or files hold something else than its state.
    """
    look_through(state)
    command = [sys.executable, "-m", __name__]
    command += ["--input_folder", str(state), "--output_folder", str(target)]
    command += ["--inject_missing_state"]  # ours has no parameter patterns of model parallelism
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"{state} cannot be converted to another layout: {lines[-1]}")


@contextlib.contextmanager
def _deepspeed_reads(folder: Path) -> Iterator[None]:
    """DeepSpeed reads what is in `folder` in this block.

    Raises:
        UserError: files that hold more than data, or not what DeepSpeed looks for in them.
    """
    try:
        with tensors_alone(HARMLESS):
            yield
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(refusal(folder, error)) from error
    except Exception as error:  # reading rubbish, DeepSpeed raises anything
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{folder}: not a state that DeepSpeed can read ({type(error).__name__}: {reason})"
        ) from error


def atom(zero: Path, key: str, name: str) -> Tensor:
    """A parameter in folder `zero` of the universal format: its weights `fp32`, or a moment."""
    saved = read_pickle(zero / name / f"{key}.pt")
    tensor = saved["param"] if isinstance(saved, dict) else saved
    assert isinstance(tensor, Tensor)
    return tensor


def _convert() -> None:
    """DeepSpeed's converter with its own arguments, as `to_universal` starts it."""
    multiprocessing.set_start_method("fork")  # its workers know what is allowed, too
    with tensors_alone(HARMLESS):
        ds_to_universal.main(ds_to_universal.parse_arguments())


if __name__ == "__main__":
    _convert()
