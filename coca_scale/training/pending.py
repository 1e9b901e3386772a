"""A save under way, into the run folder or onto the nodes."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from coca_scale.engine.checkpoint import step_of
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
        return step_of(self.final.name)

    def written(self, world: World) -> Entries:
        """This rank's files, once those of all ranks are on the disks. A collective.

        Raises:
            AgreedError: a disk did not take them.
        """
        return world.agree(lambda: self._result(world.rank))

    def _result(self, rank: int) -> Entries:
        try:
            return self.files.result()
        except OSError as error:
            raise UserError(f"rank {rank}: {refusal(error)}") from error


def of_all_ranks(mine: Entries, world: World) -> Entries:
    """The files of all ranks. A collective."""
    return {name: entry for part in world.gather(mine) for name, entry in part.items()}
