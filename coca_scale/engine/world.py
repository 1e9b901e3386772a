"""The processes of a job, and how they agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from coca_scale.errors import AgreedError, UserError, system_faults
from coca_scale.recipe.text import visible

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a job; what is called a collective is called by all of them.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
        group: all ranks, for tensors on the device; None for a process that talks to nobody.
        gather_group: all ranks again, for collectives that run beside the others.
        host_group: all ranks, for what the hosts agree on while their devices compute.
        device: where this rank computes.
        hosts: host name of every rank.
    """

    rank: int
    size: int
    group: dist.ProcessGroup | None
    gather_group: dist.ProcessGroup | None
    host_group: dist.ProcessGroup | None
    device: torch.device
    hosts: tuple[str, ...]

    @classmethod
    def alone(cls, device: torch.device) -> World:
        """This process and no other; nothing is started."""
        return cls(0, 1, None, None, None, device, ("localhost",))

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all ranks, in fp64. A collective of hosts, not of devices."""
        if self.host_group is None:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.host_group)
        return [float(v) for v in total.tolist()]

    def sum_on_device(self, values: Tensor) -> Tensor:
        """A tensor on the device, summed over all ranks in place. A collective; no host waits."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def gather(self, value: T) -> list[T]:
        """A small object from every rank, on every rank. A collective of hosts."""
        if self.host_group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def agree(self, action: Callable[[], T], first_alone: bool = False) -> T:
        """Run `action` on every rank, and let all fail together if it fails on one. A collective.

        Args:
            action: what every rank does; a UserError in it, or a refusal of the operating system,
                is its failure. Anything else is a fault of ours and is raised where it happens.
            first_alone: rank 0 is through before the others begin, so that only one downloads.

        Returns:
            What `action` returned on this rank.

        Raises:
            AgreedError: with the failure of the first rank that failed, on every rank.
        """
        result: Any = None
        for is_turn in (self.rank == 0, self.rank != 0) if first_alone else (True,):
            error = None
            if is_turn:
                result, error = _attempt(action)
            self.fail_together(error)
        return cast(T, result)

    def on_first(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 alone, and hand its result to all. A collective.

        Raises:
            AgreedError: as `agree`.
        """
        result, error = _attempt(action) if self.rank == 0 else (None, None)
        result, error = self.gather((result, error))[0]
        if error is not None:
            raise AgreedError(error)
        return cast(T, result)

    def fail_together(self, error: str | None) -> None:
        """Let all ranks fail if one of them has an error. A collective.

        Raises:
            AgreedError: with the first of the errors, on every rank.
        """
        failed = [e for e in self.gather(error) if e is not None]
        if failed:
            raise AgreedError(failed[0])

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum(0.0)

    def name_of(self, rank: int) -> str:
        """A rank as a person looks for it."""
        return f"rank {rank} on {self.hosts[rank]}"

    @property
    def ranks_per_node(self) -> int:
        """Ranks of every host, 1 if they have different numbers."""
        counts = {self.hosts.count(host) for host in self.hosts}
        return counts.pop() if len(counts) == 1 else 1

    def set_timeout(self, seconds: float) -> None:
        """How long any collective may take from now on, in every group. A collective."""
        self.barrier()  # nobody is still in one that began under the old limit
        # public since torch 2.15
        set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
        for group in list(distributed_c10d._world.pg_map):
            set_timeout(timedelta(seconds=seconds), group)


def _attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """What `action` returns, or what a user can mend."""
    try:
        with system_faults():
            return action(), None
    except UserError as error:
        return None, visible(str(error))
