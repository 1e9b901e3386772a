"""An exponential moving average of the fp32 weights, sharded as DeepSpeed shards them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coca_scale.engine.zero import ZeroEngine
from coca_scale.engine.zero_slices import SavedState
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
        saved = saved_average(folder)
        self._updates.fill_(saved.beside["updates"])
        for mine, average in zip(self._average, saved.masters(rank), strict=True):
            mine.copy_(average)

    def load_resharded(self, saved: SavedState, others: Mapping[str, Tensor]) -> None:
        """Read what a run of another layout saved.

        Args:
            saved: by `saved_average`.
            others: averages that are not in it as they are here, by name.
        """
        self._updates.fill_(saved.beside["updates"])
        kept = [master.detach().clone() for master in self._masters]
        self._engine.set_state(saved, others)
        for mine, master, before in zip(self._average, self._masters, kept, strict=True):
            mine.copy_(master.detach())
            master.data.copy_(before)


def saved_average(folder: Path) -> SavedState:
    """The average in a checkpoint.

    Raises:
        UserError: it has none.
    """
    if not (folder / AVERAGE_FOLDER).is_dir():
        raise UserError(f"{folder} holds no average of the weights; resume without optim.ema_decay")
    return SavedState(folder / AVERAGE_FOLDER)
