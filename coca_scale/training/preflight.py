"""What is looked at once per node before a run begins."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from coca_scale.data.sample import Source
from coca_scale.engine.host import memory_bytes
from coca_scale.engine.world import World
from coca_scale.errors import UserError, refusal
from coca_scale.model import CoCa
from coca_scale.planning.memory import StateBytes, host_bytes, made_whole, state_bytes
from coca_scale.recipe import BatchSplit, Recipe
from coca_scale.recipe.run_folder import CHECKPOINTS

PROBE = ".probe"
SHARED_MEMORY = Path("/dev/shm")
BYTES_PER_PARAMETER = 14  # fp32 master and two moments, and the parameter in 16 bits


def preflight(world: World, folder: Path, sources: list[Source], shared_bytes: int = 0) -> None:
    """See on every node that data and run folder are there. A collective.

    Args:
        world: the ranks.
        folder: of the run.
        sources: data.
        shared_bytes: of shared memory in which the loader processes of a rank hand over batches.

    Raises:
        AgreedError: naming the node on which something is not as it should be.
    """
    token = f"{os.getpid()} {os.urandom(8).hex()}"

    def leave_token() -> str:
        try:
            (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
            (folder / PROBE).write_text(token)
        except OSError as error:
            raise UserError(f"the run folder cannot be written: {refusal(error)}") from error
        return token

    def look_once_per_node() -> None:
        host = world.hosts[world.rank]
        if world.hosts.index(host) == world.rank:
            try:
                _look(folder, expected, sources)
                _look_at_shared_memory(shared_bytes * world.hosts.count(host))
            except UserError as error:
                several = len(set(world.hosts)) > 1
                raise UserError(f"{host}: {error}" if several else str(error)) from error

    try:
        expected = world.on_first(leave_token)
        world.agree(look_once_per_node)
    finally:
        if world.rank == 0:
            with suppress(OSError):  # of a folder that cannot be written, which is said already
                (folder / PROBE).unlink(missing_ok=True)


def room_for_checkpoints(folder: Path, parameters: int) -> str | None:
    """A warning if the disk has room for less than two checkpoints of so many parameters."""
    free, needed = shutil.disk_usage(folder).free, parameters * BYTES_PER_PARAMETER
    if free >= 2 * needed:
        return None
    return f"warning: {free / 1e9:.1f} GB free for checkpoints of about {needed / 1e9:.1f} GB each"


def room_in_host(recipe: Recipe, batch: BatchSplit, model: CoCa, world: World) -> str | None:
    """A warning if the ranks of this node will need more memory than it has."""
    state, parameters = _state_of(recipe, batch, model, world)
    kept = state.offloaded
    kept += state.total + state.updating if world.device.type == "cpu" else 0
    image_size, whole = model.config.vision_cfg.image_size, made_whole(model.config, parameters)
    need = host_bytes(recipe, batch, image_size, whole, kept, state.saved)
    total, there = need.total * world.ranks_per_node, memory_bytes()
    if total <= there:
        return None
    return (
        f"warning: the {world.ranks_per_node} ranks of this node need {total / 1e9:.1f} GB of its "
        f"{there / 1e9:.1f} GB of memory, activations not counted; coca-scale plan shows the parts"
    )


def bytes_of_a_save(recipe: Recipe, batch: BatchSplit, model: CoCa, world: World) -> int:
    """About what the ranks of this node write for a checkpoint."""
    return _state_of(recipe, batch, model, world)[0].saved * world.ranks_per_node


def _state_of(
    recipe: Recipe, batch: BatchSplit, model: CoCa, world: World
) -> tuple[StateBytes, int]:
    """What a rank has of a model, and the parameters of that."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    parameters, trained = (sum(n for n, t in sizes if t or not only) for only in (False, True))
    return state_bytes(recipe, batch, parameters, trained, world.ranks_per_node), parameters


def _look_at_shared_memory(needed: int) -> None:
    if not needed or not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise UserError(
            f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free and the loader processes here hand over "
            f"batches of {needed / 1e6:.0f} MB through it; give a container more (docker run "
            "--shm-size=16g, or --ipc=host), or set data.workers=0"
        )


def _look(folder: Path, token: str, sources: list[Source]) -> None:
    probe = folder / PROBE
    if not probe.is_file() or probe.read_text() != token:
        raise UserError(
            f"does not see what rank 0 wrote into {folder.absolute()}; run.dir must be on storage "
            "that all nodes share"
        )
    for source in sources:
        source.check()
