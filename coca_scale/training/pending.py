"""A save under way, into the run folder or onto the nodes."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from coca_scale.engine.world import World
from coca_scale.engine.writing import Entries
from coca_scale.errors import UserError, refusal


@dataclass
class Pending:
    """Where it will be, where it is, when it is written, what it has cost."""

    final: Path
    temporary: Path
    files: Future[Entries]
    started: float
    blocked_seconds: float

    @property
    def step(self) -> int:
        """That it is of."""
        return int(self.final.name.removeprefix("step_"))

    def files_of(self, world: World) -> tuple[Entries, Entries]:
        """The files of this rank and those of all, once they are on the disks. A collective.

        Raises:
            AgreedError: a disk did not take them.
        """
        mine = world.agree(lambda: self._written(world.rank))
        return mine, {name: entry for part in world.gather(mine) for name, entry in part.items()}

    def _written(self, rank: int) -> Entries:
        try:
            return self.files.result()
        except OSError as error:
            raise UserError(f"rank {rank}: {refusal(error)}") from error
