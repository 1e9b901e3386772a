"""An exponential moving average of the fp32 weights, sharded as DeepSpeed shards them."""

from __future__ import annotations

import os
import shutil
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
from torch import Tensor

AVERAGE_FOLDER = "average"


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

    def save(self, folder: Path, tag: str, rank: int) -> None:
        """Write this rank's shard in DeepSpeed's format, next to the state it has saved already.

        So its own tool puts the average together as it does the weights.
        """
        target = folder / AVERAGE_FOLDER / tag
        target.mkdir(parents=True, exist_ok=True)
        saved = _shard(folder / tag, rank)
        assert saved is not None, "the average is saved after the weights"
        # DeepSpeed's own pickle, written by this process a moment ago
        state = torch.load(saved, map_location="cpu", weights_only=False, mmap=True)
        state = state[OPTIMIZER_STATE_DICT]
        names = (ZERO_STAGE, PARTITION_COUNT, PARAM_ALIGNMENT_PADDINGS)
        kept = {name: state[name] for name in names if name in state}
        key = FP32_FLAT_GROUPS if FP32_FLAT_GROUPS in state else SINGLE_PARTITION_OF_FP32_GROUPS
        assert [t.shape for t in state[key]] == [t.shape for t in self._average]
        kept[key] = self._average
        torch.save({OPTIMIZER_STATE_DICT: kept, "updates": self._updates}, target / saved.name)
        if rank == 0:
            for file in (folder / tag).glob("*model_states.pt"):
                _link(file, target / file.name)

    def load(self, folder: Path, tag: str, rank: int) -> None:
        """Read what `save` wrote.

        Raises:
            ValueError: the checkpoint has no average.
        """
        file = _shard(folder / AVERAGE_FOLDER / tag, rank)
        if file is None:
            raise ValueError(
                f"{folder} holds no average of the weights; resume without optim.ema_decay"
            )
        state = torch.load(file, map_location="cpu", weights_only=False)
        self._updates = state["updates"]
        shards = state[OPTIMIZER_STATE_DICT]
        averages = shards.get(FP32_FLAT_GROUPS) or shards[SINGLE_PARTITION_OF_FP32_GROUPS]
        for mine, saved in zip(self._average, averages, strict=True):
            mine.copy_(saved)


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(file, target)


def _shard(folder: Path, rank: int) -> Path | None:
    return next(iter(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")), None)
