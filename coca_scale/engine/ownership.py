"""What a job writes is its own: rank 0 takes it, and all ranks know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from coca_scale.engine.world import World
from coca_scale.recipe.lock import Claim, Lock


class Owner:
    """What the ranks of a job know of the ownership of what it writes.

    Args:
        lock: of rank 0; None where nobody locks: a loop inside another program, which keeps its
            own order.
        first: whether this is rank 0.
    """

    def __init__(self, lock: Lock | None, first: bool) -> None:
        self._lock = lock
        self._first = first

    def holds(self) -> bool:
        """Whether this process may write what is the job's own: it is rank 0, and owner. Local."""
        return self._first and (self._lock is None or self._lock.holds())

    def require(self) -> None:
        """See that it has not been taken over, on rank 0; others are told by it. Local.

        Raises:
            UserError: it has been, and by whom.
        """
        if self._lock is not None:
            self._lock.require()


@contextmanager
def owned(claim: Claim, world: World) -> Iterator[Owner]:
    """The target for the ranks of this job alone, while the block runs. A collective.

    Raises:
        AgreedError: another job has it.
    """
    taken: list[Lock] = []
    world.on_first(lambda: taken.append(Lock.take(claim)))
    try:
        yield Owner(taken[0] if taken else None, world.rank == 0)
    finally:
        for lock in taken:
            lock.release()
