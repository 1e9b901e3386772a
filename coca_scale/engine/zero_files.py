"""DeepSpeed's files of a checkpoint: their layout, and that there is nothing but data in them.

DeepSpeed itself unpickles anything. Whatever reads its files, here and in its engine, does so under
`tensors_alone`: tensors, plain data, and the few classes of `HARMLESS`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from coca_scale.errors import UserError
from coca_scale.model.pickles import read_pickle

STATE_TAG = "state"  # of the one state that a checkpoint folder has
# that DeepSpeed writes: their constructors store what they are given
HARMLESS = (DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address)


class Layout(NamedTuple):
    """How optimizer state is cut."""

    ranks: int
    zero_stage: int

    def __str__(self) -> str:
        return f"{self.ranks} ranks at ZeRO stage {self.zero_stage}"


def fits_layout(saved: Layout, wanted: Layout, checkpoint: Path) -> bool:
    """Whether state of one layout is as a run of another one wants it: every file for one rank.

    Raises:
        UserError: it cannot be made to fit.
    """
    if saved.zero_stage == wanted.zero_stage == 0:  # replicas, which fit any number of ranks
        return True
    if 0 in (saved.zero_stage, wanted.zero_stage):
        raise UserError(
            f"{checkpoint} was written by {saved}; ZeRO stage 0 and the others cannot be "
            "converted into each other. Set engine.zero_stage as it was"
        )
    return saved == wanted


def look_through(state: Path, share: int = 0, shares: int = 1) -> None:
    """See that every `shares`-th file of DeepSpeed's folder, from number `share` on, is only data.

    Raises:
        UserError: a file that is damaged or holds something else.
    """
    for file in sorted(state.glob("*.pt"))[share::shares]:
        read_pickle(file, HARMLESS, mapped=True)


def replica_weights(folder: Path) -> dict[str, Tensor]:
    """The parameters of a checkpoint of stage 0, by name.

    Raises:
        UserError: damaged, or holding something else.
    """
    file = folder / STATE_TAG / "mp_rank_00_model_states.pt"
    content = read_pickle(file, HARMLESS)
    weights = content.get("module") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise not_a_state(file)
    return weights


def not_a_state(file: Path) -> UserError:
    """What is said of a file that holds something else than a state."""
    return UserError(f"{file}: not a state that DeepSpeed wrote; the checkpoint is damaged")
