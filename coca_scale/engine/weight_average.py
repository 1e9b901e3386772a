"""An exponential moving average of the fp32 weights, sharded as DeepSpeed shards them."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    FP32_FLAT_GROUPS,
    OPTIMIZER_STATE_DICT,
    PARAM_ALIGNMENT_PADDINGS,
    PARTITION_COUNT,
    SINGLE_PARTITION_OF_FP32_GROUPS,
    ZERO_STAGE,
)
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from coca_scale.engine.resharding import set_state
from coca_scale.errors import UserError

AVERAGE_FOLDER = "average"
NO_AVERAGE = "{} holds no average of the weights; resume without optim.ema_decay"


def master_weights(engine: Any, zero_stage: int) -> list[Tensor]:
    """This rank's fp32 weights that the optimizer updates, in DeepSpeed's own order."""
    if zero_stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    assert zero_stage > 0, "the recipe refuses an average at stage 0"
    return list(engine.optimizer.single_partition_of_fp32_groups)


class WeightAverage:
    """Average of `masters`; nothing is communicated, every rank averages its shard."""

    def __init__(self, masters: list[Tensor], decay: float) -> None:
        self._masters = masters
        self._average = [master.detach().clone() for master in masters]
        self._decay = decay
        self._updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in one more step; early ones weigh more, so that the start is forgotten."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        masters = [master.detach() for master in self._masters]
        torch._foreach_lerp_(self._average, masters, 1 - decay)

    def state(self, optimizer_state: dict[str, Any]) -> dict[str, Any]:
        """This rank's shard in DeepSpeed's format, so that its own tool puts the average together.

        Args:
            optimizer_state: state dict of DeepSpeed's optimizer, which says how the shard is cut.
        """
        names = (ZERO_STAGE, PARTITION_COUNT, PARAM_ALIGNMENT_PADDINGS)
        kept: dict[str, Any] = {n: optimizer_state[n] for n in names if n in optimizer_state}
        flat = FP32_FLAT_GROUPS in optimizer_state
        key = FP32_FLAT_GROUPS if flat else SINGLE_PARTITION_OF_FP32_GROUPS
        assert [t.shape for t in optimizer_state[key]] == [t.shape for t in self._average]
        kept[key] = self._average
        return {OPTIMIZER_STATE_DICT: kept, "updates": self._updates}

    def load(self, folder: Path, tag: str, rank: int) -> None:
        """Read what `save` wrote.

        Raises:
            UserError: the checkpoint has no average.
        """
        file = _shard(folder / AVERAGE_FOLDER / tag, rank)
        if file is None:
            raise UserError(NO_AVERAGE.format(folder))
        state = torch.load(file, map_location="cpu", weights_only=False)
        self._updates = state["updates"]
        shards = state[OPTIMIZER_STATE_DICT]
        averages = shards.get(FP32_FLAT_GROUPS) or shards[SINGLE_PARTITION_OF_FP32_GROUPS]
        for mine, saved in zip(self._average, averages, strict=True):
            mine.copy_(saved)

    def load_resharded(self, folder: Path, tag: str, engine: Any) -> None:
        """Read what runs of another layout wrote.

        Raises:
            UserError: the checkpoint has no average.
        """
        source = folder / AVERAGE_FOLDER
        first = _shard(source / tag, 0)
        if first is None:
            raise UserError(NO_AVERAGE.format(folder))
        self._updates = torch.load(first, map_location="cpu", weights_only=False)["updates"]
        silence = io.StringIO()  # DeepSpeed prints its progress
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            full = get_fp32_state_dict_from_zero_checkpoint(str(source), tag, lazy_mode=True)
        kept = [master.detach().clone() for master in self._masters]
        set_state(engine, lambda name: full[name].contiguous())
        for mine, master, before in zip(self._average, self._masters, kept, strict=True):
            mine.copy_(master.detach())
            master.data.copy_(before)


def _shard(folder: Path, rank: int) -> Path | None:
    return next(iter(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")), None)
