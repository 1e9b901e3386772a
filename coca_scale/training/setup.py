"""All that a run has before its first step: data, model, engine, and where it goes on."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from coca_scale.data.lengths import balanced_order
from coca_scale.data.loader import LaneStates, StepBatch, TrainDataset, TrainLoader, deal_lanes
from coca_scale.data.sample import Source
from coca_scale.data.sources import open_source, train_crop
from coca_scale.data.tokens import FastTokenizer, Tokenizer, make_tokenizer
from coca_scale.engine.checkpoint import (
    find_checkpoint,
    newest_intact,
    read_progress,
    sweep,
    verify_together,
)
from coca_scale.engine.config import own_attention
from coca_scale.engine.host import memory_bytes
from coca_scale.engine.train_engine import TrainEngine
from coca_scale.engine.world import World
from coca_scale.errors import AgreedError, UserError
from coca_scale.evaluation.zeroshot import open_labelled
from coca_scale.model import ModelConfig
from coca_scale.planning.check import tracking_fault
from coca_scale.planning.costs import blocks_to_recompute, model_flops
from coca_scale.planning.fit import fitted
from coca_scale.planning.gpus import GPUS, Gpu, peak_flops
from coca_scale.recipe import BatchSplit, Recipe, dump_recipe
from coca_scale.recipe.run_folder import CHECKPOINTS, RECIPE, VERSIONS
from coca_scale.recipe.total_steps import total_steps
from coca_scale.recipe.whole_files import write_whole
from coca_scale.training.identity import Identity, compare, identify
from coca_scale.training.initial import find_start, initial_model
from coca_scale.training.preflight import preflight, room_for_checkpoints, room_in_host
from coca_scale.training.validation import Validation
from coca_scale.version import __version__


@dataclass(frozen=True)
class Prepared:
    """What a recipe means here, found out by every rank for itself.

    Attributes:
        recipe: of the run.
        batch_split: how a step is divided.
        config: of the model.
        tokenizer: of the model.
        source: of training samples.
        validation: of the model, if the recipe has validation data.
        sources: all data, to be looked at on every node.
        steps: length of the run.
    """

    recipe: Recipe
    batch_split: BatchSplit
    config: ModelConfig
    tokenizer: Tokenizer
    source: Source
    validation: Validation | None
    sources: list[Source]
    steps: int

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.recipe.run.folder / CHECKPOINTS

    @property
    def shared_bytes(self) -> int:
        """Pictures of a rank that its loader processes hold for it when they are ahead of it."""
        size, ahead = self.config.vision_cfg.image_size, 2 if self.recipe.data.workers else 0
        return ahead * self.batch_split.samples_per_rank * 3 * size * size

    def loader(self, lanes: LaneStates) -> TrainLoader:
        """This rank's share of every step, from where its lanes stand."""
        recipe, split = self.recipe, self.batch_split
        dataset = TrainDataset(
            source=self.source,
            tokenizer=self.tokenizer,
            crop=train_crop(
                recipe.data, self.config.vision_cfg.image_size, self.config.preprocess_cfg
            ),
            seed=recipe.run.seed,
            lanes=split.lanes,
            samples_per_lane=split.samples_per_lane,
            states=lanes,
        )
        arrange = partial(balanced_order, micro_batch=split.micro_batch)
        return TrainLoader(
            dataset, recipe.data.workers, arrange if split.accumulation > 1 else None
        )

    def write(self, ranks: int) -> None:
        """The resolved recipe into the run folder, and what it runs with."""
        folder = self.recipe.run.folder
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / RECIPE, dump_recipe(self.recipe))
        if isinstance(self.tokenizer, FastTokenizer):
            self.tokenizer.save(folder)
        packages = ("torch", "deepspeed", "open_clip_torch")
        versions = {"python": platform.python_version(), **{p: version(p) for p in packages}}
        versions["coca-scale"] = __version__
        about = {"versions": versions, "git_commit": _git_commit(), "ranks": ranks}
        write_whole(folder / VERSIONS, json.dumps(about, indent=1) + "\n")


@dataclass(frozen=True)
class Setup:
    """A run that is ready to begin or to go on.

    Attributes:
        prepared: of the run.
        resumed: checkpoint to load, None for a new run.
        progress: what that keeps of the loop; empty for a new run.
        lanes: of this rank, where its data begins or goes on.
        batches: this rank's share of every step, endless; None if no step is left.
        engine: with the model that the run begins with.
        identity: what the run is, for its checkpoints.
        samples_at_peak: samples per second if this device computed all the time; None for one not
            known, and on ranks other than 0.
        notes: what a user should know.
    """

    prepared: Prepared
    resumed: Path | None
    progress: dict[str, Any]
    lanes: LaneStates
    batches: Generator[StepBatch] | None
    engine: TrainEngine
    identity: Identity
    samples_at_peak: float | None
    notes: list[str]


def set_up(recipe: Recipe, world: World, lanes: LaneStates | None = None) -> Setup:
    """Prepare everything. A collective.

    Args:
        recipe: of the run.
        world: the ranks.
        lanes: where this rank's data goes on, and not where the checkpoint says.

    Raises:
        AgreedError: the recipe does not fit the model, the data or the number of ranks, the
            checkpoint is of another run, or weights cannot be loaded.
    """
    prepared = world.agree(lambda: prepare(recipe, world))
    folder, notes = recipe.run.folder, list[str]()
    preflight(world, folder, prepared.sources, prepared.shared_bytes)
    resumed = _agreed_checkpoint(prepared, world, notes)
    identity = world.on_first(
        lambda: identify(recipe, world.size, prepared.tokenizer, prepared.source)
    )
    split, progress = prepared.batch_split, dict[str, Any]()
    if resumed is not None:
        progress = world.agree(lambda: read_progress(resumed))
        about = (identity, prepared.config, split.lanes)
        notes += world.on_first(lambda: compare(resumed, progress, *about))
    start = find_start(recipe, prepared.config, resumed, world)
    prepared = replace(prepared, config=start.config)
    if lanes is None:
        saved = progress.get("lanes")
        lanes = world.agree(lambda: deal_lanes(split.lanes, world.rank, world.size, saved))
    # its processes are copies of this one, and would keep a model that they had seen
    left = progress.get("step", 0) < prepared.steps or resumed is None
    batches = iter(prepared.loader(lanes)) if left else None
    coca, logit_scale = initial_model(recipe, start, world, notes)
    room = room_for_checkpoints(folder, sum(p.numel() for p in coca.parameters()))
    crowded = room_in_host(recipe, split, coca, world)
    notes += [note for note in (room, crowded) if note is not None]
    samples_at_peak = _samples_at_peak(prepared, world)
    fitting = recipe
    if "auto" in (recipe.engine.activation_checkpointing, recipe.engine.kept_graphs):
        here = (_device(world), world.ranks_per_node)
        fitting = world.on_first(lambda: fitted(recipe, split, *here)[0])
        notes += _chosen(recipe, fitting, split)
    recomputed = world.on_first(lambda: blocks_to_recompute(fitting, split))
    if recomputed:
        notes.append(f"recomputing {len(recomputed)} blocks to keep to the activation budget")
    engine = TrainEngine(coca, logit_scale, fitting, split, world, recomputed)
    attention = own_attention(coca, recipe.engine.precision)
    notes += [] if attention is None else [attention]
    return Setup(
        prepared, resumed, progress, lanes, batches, engine, identity, samples_at_peak, notes
    )


def _chosen(recipe: Recipe, fitting: Recipe, split: BatchSplit) -> list[str]:
    """What `auto` has come to."""
    asked, found, notes = recipe.engine, fitting.engine, list[str]()
    if asked.activation_checkpointing == "auto":
        notes.append(f"activation_checkpointing auto is {found.activation_checkpointing}")
    if asked.kept_graphs == "auto" and split.accumulation > 1:
        kept = f"{found.kept_graphs} of {split.accumulation} micro-batches"
        notes.append(f"kept_graphs auto is {kept}")
    return notes


def prepare(recipe: Recipe, world: World) -> Prepared:
    """Everything that needs no other rank.

    Raises:
        UserError: a fault of the recipe or the data.
    """
    if recipe.engine.precision == "fp16" and world.device.type == "cpu":
        raise UserError("engine.precision=fp16 needs a GPU; use fp32 or bf16 here")
    if (fault := tracking_fault(recipe)) is not None:
        raise UserError(fault)
    batch_split = BatchSplit.from_recipe(recipe, world.size)
    config = ModelConfig.from_recipe(recipe.model)
    start = recipe.model.pretrained
    tokenizer = make_tokenizer(config, Path(start) if start is not None else None)
    source = open_source(recipe.data.train, recipe.data, recipe.run.seed)
    sources, validation = [source], None
    if recipe.data.val is not None:
        held_out = open_source(recipe.data.val, recipe.data, recipe.run.seed)
        sources.append(held_out)
        validation = _validation(recipe, config, tokenizer, held_out)
    samples_per_epoch = recipe.data.train_samples or source.count()
    steps = total_steps(recipe.train, samples_per_epoch)
    return Prepared(recipe, batch_split, config, tokenizer, source, validation, sources, steps)


def _validation(
    recipe: Recipe, config: ModelConfig, tokenizer: Tokenizer, source: Source
) -> Validation:
    settings, labelled = recipe.eval, None
    if settings.zeroshot is not None:
        names = (settings.classnames, settings.templates)
        labelled = open_labelled([settings.zeroshot], recipe.data, *names)
    captions = config.multimodal_cfg is not None
    return Validation(source, tokenizer, settings, labelled, captions)


def _agreed_checkpoint(prepared: Prepared, world: World, notes: list[str]) -> Path | None:
    """The checkpoint the recipe asks for, whole; all ranks the same one, or none.

    Raises:
        AgreedError: the one asked for is damaged, or the run folder should be empty.
    """
    resume, parent = prepared.recipe.checkpoint.resume, prepared.checkpoints
    world.on_first(lambda: sweep(parent))
    if resume == "auto":
        return newest_intact(parent, world, notes)
    if resume == "never":
        if world.on_first(lambda: find_checkpoint(parent)) is not None:
            raise AgreedError(
                f"{prepared.recipe.run.folder} holds checkpoints already; choose another run.dir, "
                "or checkpoint.resume=auto to go on from there"
            )
        return None
    verify_together(Path(resume), world)
    return Path(resume)


def _device(world: World) -> Gpu:
    """This rank's, with the memory that it has."""
    if world.device.type == "cpu":
        return replace(GPUS["cpu"], memory_bytes=memory_bytes() / world.ranks_per_node)
    there = torch.cuda.get_device_properties(world.device).total_memory
    return replace(GPUS["h100-80gb"], memory_bytes=float(there))


def _samples_at_peak(prepared: Prepared, world: World) -> float | None:
    on_gpu = world.device.type == "cuda"
    flops = peak_flops(torch.cuda.get_device_name() if on_gpu else platform.machine())
    if world.rank != 0 or flops is None:
        return None
    return flops / model_flops(prepared.recipe, prepared.batch_split)


def _git_commit() -> str | None:
    """Commit of the code, None outside a git checkout."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None
