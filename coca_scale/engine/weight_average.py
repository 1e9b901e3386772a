"""An exponential moving average of the fp32 weights, sharded as DeepSpeed shards them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coca_scale.engine.zero import ZeroEngine
from coca_scale.engine.zero_files import full_weights, read_shard
from coca_scale.errors import UserError

AVERAGE_FOLDER = "average"


class WeightAverage:
    """Average of an engine's masters; nothing is communicated, every rank averages its shard."""

    def __init__(self, engine: ZeroEngine, decay: float) -> None:
        self._engine = engine
        self._masters = engine.masters()
        self._average = [master.detach().clone() for master in self._masters]
        self._decay = decay
        self._updates = torch.zeros((), dtype=torch.float64, device=self._masters[0].device)

    @torch.no_grad()
    def update(self, applied: Tensor) -> None:
        """Take in one more step; early ones weigh more, so that the start is forgotten.

        Args:
            applied: boolean scalar on the device, False where the step changed nothing.
        """
        self._updates += applied
        decay = ((1 + self._updates) / (10 + self._updates)).clamp(max=self._decay)
        share = ((1 - decay) * applied).to(self._average[0].dtype)
        for average, master in zip(self._average, self._masters, strict=True):
            average.lerp_(master.detach(), share)

    def state(self) -> dict[str, Any]:
        """This rank's shard in DeepSpeed's format, which its own tool puts together."""
        return {**self._engine.shard(self._average), "updates": int(self._updates)}

    def load(self, folder: Path, rank: int) -> None:
        """Read what a run of this layout saved.

        Raises:
            UserError: the checkpoint has no average.
        """
        averages, updates = _saved(folder, rank)
        self._updates.fill_(updates)
        for mine, saved in zip(self._average, averages, strict=True):
            mine.copy_(saved)

    def load_resharded(self, folder: Path, others: Mapping[str, Tensor]) -> None:
        """Read what a run of another layout saved.

        Args:
            folder: of the checkpoint.
            others: averages that are not in it as they are here, by name.

        Raises:
            UserError: the checkpoint has no average.
        """
        _, updates = _saved(folder, 0)
        self._updates.fill_(updates)
        full = full_weights(folder / AVERAGE_FOLDER, lazy=True)
        kept = [master.detach().clone() for master in self._masters]
        self._engine.set_state(
            lambda name: others[name] if name in others else full[name].contiguous()
        )
        for mine, master, before in zip(self._average, self._masters, kept, strict=True):
            mine.copy_(master.detach())
            master.data.copy_(before)


def _saved(folder: Path, rank: int) -> tuple[list[Tensor], int]:
    found = read_shard(folder / AVERAGE_FOLDER, rank)
    if found is None:
        raise UserError(f"{folder} holds no average of the weights; resume without optim.ema_decay")
    averages, beside = found
    return averages, beside["updates"]
