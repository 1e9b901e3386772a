"""Which rank is this process, and how does it reach the others."""

from __future__ import annotations

import os
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SLURM_VARIABLES = {
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
    "WORLD_SIZE": "SLURM_NTASKS",
}
_MPI_MARKERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


class AgreedError(RuntimeError):
    """Something that ends the run, raised by every rank together: one rank may report it."""


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
        group: all ranks.
        gather_group: all ranks again, for collectives that run beside the others.
        device: where this rank computes.
    """

    rank: int
    size: int
    group: dist.ProcessGroup
    gather_group: dist.ProcessGroup
    device: torch.device

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all ranks, in fp64. A collective."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.group)
        return [float(v) for v in total.tolist()]

    def agree(self, error: str | None) -> None:
        """Let all ranks fail together if one of them has an error. A collective.

        Raises:
            AgreedError: with the first of the errors, on every rank.
        """
        failed = [e for e in self.gather(error) if e is not None]
        if failed:
            raise AgreedError(failed[0])

    def gather(self, value: object) -> list[object]:
        """A small object from every rank, on every rank. A collective."""
        values: list[object] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum(0.0)


def planned_size() -> int:
    """Number of processes of this launch, known before they have met."""
    for name in ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 1


def planned_rank() -> int:
    """Rank of this process, known before they have met."""
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def start_world() -> World:
    """Join the process group: DeepSpeed launcher, torchrun, srun, mpirun, or a single process."""
    if "SLURM_PROCID" in os.environ and "MASTER_ADDR" in os.environ and "RANK" not in os.environ:
        for name, slurm_name in _SLURM_VARIABLES.items():
            os.environ[name] = os.environ[slurm_name]
    by_mpi = any(name in os.environ for name in _MPI_MARKERS)
    if not by_mpi and "RANK" not in os.environ:
        defaults = ("0", "0", "1", "127.0.0.1", "29500")
        for name, value in zip(_LAUNCHER_VARIABLES, defaults, strict=True):
            os.environ.setdefault(name, value)
    accelerator = get_accelerator()
    deepspeed.init_distributed(accelerator.communication_backend_name(), verbose=False)
    local_rank = int(os.environ["LOCAL_RANK"])
    if accelerator.device_name() != "cpu":
        accelerator.set_device(local_rank)
    device = torch.device(accelerator.current_device_name())
    world, gather_group = dist.group.WORLD, dist.new_group()
    assert isinstance(world, dist.ProcessGroup)
    assert isinstance(gather_group, dist.ProcessGroup)
    return World(dist.get_rank(), dist.get_world_size(), world, gather_group, device)


def end_world() -> None:
    """Leave the process group after a run that went well."""
    dist.destroy_process_group()
