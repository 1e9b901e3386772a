"""What is looked at once per node before a run begins."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from coca_scale.data.sample import Source
from coca_scale.engine.launch import AgreedError, World

PROBE = ".probe"
BYTES_PER_PARAMETER = 14  # fp32 master and two moments, and the parameter in 16 bits


def preflight(world: World, folder: Path, sources: list[Source]) -> None:
    """See on every node that data and run folder are there. A collective.

    Args:
        world: the ranks.
        folder: of the run.
        sources: data.

    Raises:
        AgreedError: naming the node on which something is not as it should be.
    """
    token = f"{os.getpid()} {os.urandom(8).hex()}"
    try:
        if world.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / PROBE).write_text(token)
        error = None
    except OSError as fault:
        error = f"the run folder cannot be written: {fault}"
    world.agree(error)
    expected = world.gather(token)[0]
    first_here = world.hosts.index(world.hosts[world.rank]) == world.rank
    error = _look(folder, str(expected), sources) if first_here else None
    found = [(rank, e) for rank, e in enumerate(world.gather(error)) if e is not None]
    if world.rank == 0:
        (folder / PROBE).unlink(missing_ok=True)
    if found:
        rank, text = found[0]
        several = len(set(world.hosts)) > 1
        raise AgreedError(f"{world.hosts[rank]}: {text}" if several else str(text))


def room_for_checkpoints(folder: Path, parameters: int) -> str | None:
    """A warning if the disk has room for less than two checkpoints of so many parameters."""
    free, needed = shutil.disk_usage(folder).free, parameters * BYTES_PER_PARAMETER
    if free >= 2 * needed:
        return None
    return f"warning: {free / 1e9:.1f} GB free for checkpoints of about {needed / 1e9:.1f} GB each"


def _look(folder: Path, token: str, sources: list[Source]) -> str | None:
    probe = folder / PROBE
    if not probe.is_file() or probe.read_text() != token:
        return (
            f"does not see what rank 0 wrote into {folder.absolute()}; run.dir must be on storage "
            "that all nodes share"
        )
    try:
        for source in sources:
            source.check()
    except ValueError as error:
        return str(error)
    return None
