"""What a launch says of this process before the ranks have met; imports nothing heavy."""

from __future__ import annotations

import os
import socket

_SIZES = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")


def planned_size() -> int:
    """Number of processes of this launch, known before they have met."""
    name = _first_set(_SIZES)
    return int(os.environ[name]) if name is not None else 1


def planned_rank() -> int:
    """Rank of this process, known before they have met."""
    name = rank_variable()
    return int(os.environ[name]) if name is not None else 0


def rank_variable() -> str | None:
    """Name of the variable in which this process was given its rank; None without a launcher."""
    return _first_set(_RANKS)


def first_on_node() -> bool:
    """Whether this process speaks for those of its node, known before they have met."""
    name = _first_set(_LOCAL_RANKS)
    return name is None or int(os.environ[name]) == 0


def planned_host() -> str:
    """Name of this node, as a person looks for it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _first_set(names: tuple[str, ...]) -> str | None:
    return next((name for name in names if os.environ.get(name, "").isdigit()), None)
