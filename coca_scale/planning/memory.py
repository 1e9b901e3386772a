"""Bytes of a rank: of weights, gradients and optimizer state under ZeRO, and in its host.

ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

from __future__ import annotations

from dataclasses import dataclass

from coca_scale.data.shards import WINDOW_BYTES
from coca_scale.engine.config import adds_in_fp32
from coca_scale.engine.optimizer import kind_of
from coca_scale.model import ModelConfig
from coca_scale.model.deferred import BLOCK_ELEMENTS
from coca_scale.recipe import BatchSplit, Recipe

MOMENT_BYTES = 4
MASTER_BYTES = 4
AVERAGE_BYTES = 4
# measured on CPU ranks, tiny.yaml, torch 2.15: 1.0 GB; on GPUs an estimate, as CUDA adds its own
PROCESS_BYTES = 1.0e9
LOADER_BYTES = 0.16e9  # of a loader process: what it does not share with its rank, measured
SAMPLE_BYTES = 50e3  # of a picture as img2dataset leaves it at 256 px, an estimate
BATCHES_AHEAD = 4  # two pieces per loader process, one whole step put together, one in use


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one rank.

    Attributes:
        parameters: on its device.
        gradients: on its device.
        optimizer: on its device.
        updating: beside them in an optimizer step, when activations are gone: gradients in fp32.
        offloaded: of all three, what waits in the memory of the host.
        saved: what of it goes into a checkpoint.
    """

    parameters: int
    gradients: int
    optimizer: int
    updating: int
    offloaded: int
    saved: int

    @property
    def total(self) -> int:
        """On the device."""
        return self.parameters + self.gradients + self.optimizer


def state_bytes(
    recipe: Recipe, batch: BatchSplit, parameters: int, trained: int, ranks_per_node: int
) -> StateBytes:
    """Bytes per rank, without activations and without what is gathered for a layer at a time.

    Args:
        recipe: says how the state is cut, and in which precision it is.
        batch: its batch over the ranks, which share the state.
        parameters: of the model.
        trained: of them, those that are not locked.
        ranks_per_node: ranks of one node.
    """
    engine, ranks = recipe.engine, batch.ranks
    element = 4 if engine.precision == "fp32" else 2
    moments = MOMENT_BYTES * len(kind_of(recipe.optim).moments)
    moments += 0 if engine.precision == "fp32" else MASTER_BYTES
    moments += 0 if recipe.optim.ema_decay is None else AVERAGE_BYTES
    stage = engine.zero_stage
    weights = parameters * element / (ranks if stage >= 3 else 1)
    wide = adds_in_fp32(recipe, batch)
    gradients = trained * (4 if wide else element) / (ranks if stage >= 2 else 1)
    optimizer = trained * moments / (ranks if stage >= 1 else 1)
    # with two groups, that with weight decay is nearly all
    copied = stage >= 1 and engine.precision != "fp32" and not wide
    updating = trained * MASTER_BYTES / ranks if copied else 0.0
    saved = optimizer
    if engine.precision == "fp32":  # weights are their own masters
        saved += trained * element / (ranks if stage >= 1 else 1)
    if stage < 3:  # of one rank, in the precision of the run
        saved += parameters * element
    offloaded = 0.0
    if engine.offload != "none":
        offloaded += gradients + optimizer + updating
        gradients = optimizer = updating = 0.0
    if engine.offload == "all":
        offloaded += weights
        weights = 0.0
    if engine.secondary_shard and ranks > ranks_per_node:
        weights += parameters * element / ranks_per_node
    kinds = (weights, gradients, optimizer, updating, offloaded, saved)
    return StateBytes(*(round(size) for size in kinds))


@dataclass(frozen=True)
class HostBytes:
    """Bytes of one rank in the memory of its host.

    Attributes:
        process: interpreter and libraries.
        loaders: loader processes, raw samples that are shuffled, batches ahead.
        building: what a start makes there before it is sharded: a block of weights at a time, or a
            whole model in fp32.
        training: what is kept there: all that training takes where it is the device, activations
            and what an optimizer step takes both, as the C library keeps most of what was freed.
        saving: what saves copy, where there is room; training waits for the disk otherwise. A
            local one and one of the run folder may be under way together.
    """

    process: int
    loaders: int
    building: int
    training: int
    saving: int

    @property
    def total(self) -> int:
        """Most at a time, without the copy of a save."""
        return self.process + self.loaders + max(self.building, self.training)


def made_whole(config: ModelConfig, parameters: int) -> int:
    """Of a model's parameters, those that a start makes all at once on the host of every rank."""
    return parameters if config.has_foreign_towers else 0


def host_bytes(
    recipe: Recipe,
    batch: BatchSplit,
    image_size: int,
    whole: int,
    training: int,
    saving: int,
) -> HostBytes:
    """What a rank takes of its host.

    Args:
        recipe: of the run.
        batch: its batch over the ranks.
        image_size: pixels per side.
        whole: parameters that a start makes all at once, `made_whole`.
        training: bytes that training keeps in the host.
        saving: bytes of a rank's share of a checkpoint.
    """
    building = 4 * max(whole, BLOCK_ELEMENTS)
    workers = min(recipe.data.workers, batch.lanes_per_rank)
    pixels = BATCHES_AHEAD * batch.samples_per_rank * 3 * image_size**2
    window = batch.lanes_per_rank * recipe.data.shuffle_window * SAMPLE_BYTES
    loaders = workers * LOADER_BYTES + pixels + min(window, WINDOW_BYTES / batch.ranks)
    saving *= 1 if recipe.checkpoint.local_every_steps is None else 2
    return HostBytes(round(PROCESS_BYTES), round(loaders), building, training, saving)
