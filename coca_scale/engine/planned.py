"""What a launch says of this process before the ranks have met; imports nothing heavy."""

from __future__ import annotations

import os


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
