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
from coca_scale.data.loader import (
    Draws,
    LaneStates,
    StepBatch,
    TrainDataset,
    TrainLoader,
    deal_lanes,
)
from coca_scale.data.sample import Source
from coca_scale.data.sources import open_source, train_crop
from coca_scale.data.tokens import FastTokenizer, Tokenizer, make_tokenizer
from coca_scale.engine.checkpoint import (
    find_checkpoint,
    newest_intact,
    read_progress,
    step_of,
    sweep,
    verify_together,
)
from coca_scale.engine.config import own_attention
from coca_scale.engine.host import memory_bytes
from coca_scale.engine.teacher import Teacher
from coca_scale.engine.train_engine import TrainEngine
from coca_scale.engine.world import World
from coca_scale.errors import AgreedError, UserError
from coca_scale.evaluation.zeroshot import open_labelled
from coca_scale.model import ModelConfig
from coca_scale.model.weights import require_resizable
from coca_scale.planning.check import caption_fault, local_fault, tracking_fault
from coca_scale.planning.costs import blocks_to_recompute, model_flops
from coca_scale.planning.fit import fitted, teacher_is_cut
from coca_scale.planning.gpus import GPUS, Gpu, peak_flops
from coca_scale.planning.teacher import require_same_size
from coca_scale.recipe import BatchSplit, Recipe, dump_recipe
from coca_scale.recipe.data import WeightedShards
from coca_scale.recipe.run_folder import CHECKPOINTS, RECIPE, VERSIONS
from coca_scale.recipe.stage_section import STAGE_KEYS
from coca_scale.recipe.stages import Stage, faults_of, stage_at, stages_of
from coca_scale.recipe.whole_files import write_whole
from coca_scale.training.identity import Identity, compare, identify
from coca_scale.training.initial import Initial, find_start, initial_model, trained_sizes
from coca_scale.training.local_saves import rescue_local
from coca_scale.training.mirror import Mirror, NoMirror
from coca_scale.training.positions import Positions, Skip
from coca_scale.training.preflight import (
    bytes_of_a_save,
    preflight,
    room_for_checkpoints,
    room_in_host,
)
from coca_scale.training.teaching import Teaching, find_teaching
from coca_scale.training.validation import Validation
from coca_scale.version import __version__


@dataclass(frozen=True)
class Prepared:
    """What a stage of a run means here, found out by every rank for itself.

    Attributes:
        stage: with its recipe.
        batch_split: how a step is divided.
        config: of the model.
        tokenizer: of the model.
        source: of training samples.
        validation: of the model, if the recipe has validation data.
        sources: all data, to be looked at on every node.
        teaching: what it learns from beside its data.
    """

    stage: Stage
    batch_split: BatchSplit
    config: ModelConfig
    tokenizer: Tokenizer
    source: Source
    validation: Validation | None
    sources: list[Source]
    teaching: Teaching | None

    @property
    def recipe(self) -> Recipe:
        """Of the stage."""
        return self.stage.recipe

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
            draws=Draws.of(recipe),
            tell=None if self.teaching is None else self.teaching.tell(self.tokenizer),
        )
        arrange = partial(balanced_order, micro_batch=split.micro_batch)
        return TrainLoader(
            dataset, recipe.data.workers, arrange if split.accumulation > 1 else None
        )


class Preparation:
    """A run's stages, prepared when they are asked for; data that several have is opened once.

    Attributes:
        run: its recipe.
        stages: of the run.
    """

    def __init__(self, recipe: Recipe, world: World, teaching: Teaching | None) -> None:
        """Raises UserError for whatever of the stages can be seen to be wrong without data."""
        if recipe.engine.precision == "fp16" and world.device.type == "cpu":
            raise UserError("engine.precision=fp16 needs a GPU; use fp32 or bf16 here")
        for fault in (tracking_fault(recipe), local_fault(recipe)):
            if fault is not None:
                raise UserError(fault)
        self.run = recipe
        self._world, self._teaching = world, teaching
        self._opened: dict[str, Source] = {}
        self._prepared: dict[int, Prepared] = {}
        self._identities: dict[int, Identity] = {}
        self.stages = stages_of(recipe, self._samples_per_epoch)
        before: ModelConfig | None = None
        for stage in self.stages:
            with faults_of(stage.name):
                BatchSplit.from_recipe(stage.recipe, world.size)
                config = ModelConfig.from_recipe(stage.recipe.model)
                if (fault := caption_fault(stage.recipe, config)) is not None:
                    raise UserError(fault)
                if teaching is not None:
                    require_same_size(recipe.loss.distill, teaching.width, config)
                if before is not None and config != before:
                    require_resizable(before, config)
            before = config

    def of(self, stage: Stage) -> Prepared:
        """A stage, with its data opened.

        Raises:
            UserError: a fault of the recipe or the data.
        """
        if stage.number not in self._prepared:
            with faults_of(stage.name):
                self._prepared[stage.number] = self._prepare(stage)
        return self._prepared[stage.number]

    def identity(self, stage: Stage) -> Identity:
        """Of the run in a stage; the first samples of its data are read once."""
        if stage.number not in self._identities:
            found = self.of(stage)
            about = (stage.recipe, self._world.size, found.tokenizer, found.source)
            teacher = None if self._teaching is None else self._teaching.identity
            self._identities[stage.number] = identify(self.run, *about, teacher)
        return self._identities[stage.number]

    def after(self, step: int) -> list[Prepared]:
        """The stages that are still to come after `step` steps, or the last one."""
        first = stage_at(self.stages, step).number
        return [self.of(stage) for stage in self.stages[first - 1 :]]

    def write(self, tokenizer: Tokenizer) -> None:
        """The resolved recipe into the run folder, and what it runs with."""
        folder = self.run.run.folder
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / RECIPE, dump_recipe(self.run))
        if isinstance(tokenizer, FastTokenizer):
            tokenizer.save(folder)
        packages = ("torch", "deepspeed", "open_clip_torch")
        versions = {"python": platform.python_version(), **{p: version(p) for p in packages}}
        versions["coca-scale"] = __version__
        about = {"versions": versions, "git_commit": _git_commit(), "ranks": self._world.size}
        write_whole(folder / VERSIONS, json.dumps(about, indent=1) + "\n")

    def _prepare(self, stage: Stage) -> Prepared:
        recipe = stage.recipe
        config = ModelConfig.from_recipe(recipe.model).for_loss(recipe.loss)
        start = recipe.model.pretrained
        tokenizer = make_tokenizer(config, Path(start) if start is not None else None)
        source = self._open(recipe.data.train)
        if self._teaching is not None:
            self._teaching.check(source)
        sources, validation = [source], None
        if recipe.data.val is not None:
            held_out = self._open(recipe.data.val)
            sources.append(held_out)
            validation = _validation(recipe, config, tokenizer, held_out)
        split = BatchSplit.from_recipe(recipe, self._world.size)
        found = (config, tokenizer, source, validation, sources)
        return Prepared(stage, split, *found, self._teaching)

    def _open(self, spec: list[WeightedShards]) -> Source:
        """Data of any stage: all of them read it alike."""
        name = repr(spec)
        if name not in self._opened:
            self._opened[name] = open_source(spec, self.run.data, self.run.run.seed)
        return self._opened[name]

    def _samples_per_epoch(self) -> int | None:
        data = self.run.data
        return data.train_samples or self._open(data.train).count()


@dataclass(frozen=True)
class Setup:
    """A stage of a run that is ready to begin or to go on.

    Attributes:
        preparation: of the run.
        prepared: of the stage.
        resumed: checkpoint to load, None for a new run.
        crossing: whether that is of the stage before.
        remade: whether that one had a model of other sizes, or trained other weights.
        progress: what that keeps of the loop; empty for a new run.
        positions: of the run's data.
        lanes: of this rank, where its data begins or goes on.
        batches: this rank's share of every step, endless; None if no step is left.
        engine: with the model that the stage begins with.
        identity: what the run is, for its checkpoints.
        samples_at_peak: samples per second if this device computed all the time; None for one not
            known, and on ranks other than 0.
        local_folder: of this node, for local saves of the run; None without.
        node_bytes: about what the ranks of this node write for a checkpoint.
        notes: what a user should know.
    """

    preparation: Preparation
    prepared: Prepared
    resumed: Path | None
    crossing: bool
    remade: bool
    progress: dict[str, Any]
    positions: Positions
    lanes: LaneStates
    batches: Generator[StepBatch] | None
    engine: TrainEngine
    identity: Identity
    samples_at_peak: float | None
    local_folder: Path | None
    node_bytes: int
    notes: list[str]


def set_up(
    recipe: Recipe, world: World, skip: Skip | None = None, mirror: Mirror | NoMirror | None = None
) -> Setup:
    """Prepare everything for the stage that comes next. A collective.

    Args:
        recipe: of the run.
        world: the ranks.
        skip: where this rank's data goes on, and not where the checkpoint says.
        mirror: of the run; None for a run that has none.

    Raises:
        AgreedError: the recipe does not fit the model, the data or the number of ranks, the
            checkpoint is of another run, or weights cannot be loaded.
    """
    teaching = world.agree(lambda: find_teaching(recipe.loss.distill), first_alone=True)
    preparation = world.agree(lambda: Preparation(recipe, world, teaching))
    folder, notes, mirror = recipe.run.folder, list[str](), mirror or NoMirror()
    local_folder = rescue_local(recipe, world, notes)
    reached = world.on_first(lambda: _reached(recipe, mirror))
    coming = world.agree(lambda: preparation.after(reached))
    sources = list(dict.fromkeys(source for stage in coming for source in stage.sources))
    preflight(world, folder, sources, max(stage.shared_bytes for stage in coming))
    resumed = _agreed_checkpoint(recipe, world, mirror, notes)
    progress = dict[str, Any]()
    if resumed is not None:
        progress = world.agree(lambda: read_progress(resumed))
        notes += world.on_first(lambda: _compare(preparation, resumed, progress))
    stage = stage_at(preparation.stages, progress.get("step", 0))
    prepared = world.agree(lambda: preparation.of(stage))
    held = preparation.stages[progress.get("stage", stage.number) - 1]
    crossing = held != stage
    remade = crossing and trained_sizes(held.recipe) != trained_sizes(stage.recipe)
    if crossing:
        before = world.agree(lambda: preparation.of(held))
        notes.append(_beginning(before, prepared, remade))
    identity = world.on_first(lambda: preparation.identity(stage))
    start = find_start(prepared.recipe, prepared.config, resumed, world)
    prepared = replace(prepared, config=start.config)
    split, positions = prepared.batch_split, Positions.of(progress, preparation.stages, stage)
    if skip is not None and skip.stage == stage.number:
        lanes = skip.lanes
    else:
        about = (split.lanes, world.rank, world.size, positions.lanes)
        lanes = world.agree(lambda: deal_lanes(*about))
    # its processes are copies of this one, and would keep a model that they had seen
    left = progress.get("step", 0) < stage.last or resumed is None
    batches = iter(prepared.loader(lanes)) if left else None
    initial = initial_model(prepared.recipe, start, world, notes)
    room = room_for_checkpoints(folder, sum(p.numel() for p in initial.coca.parameters()))
    crowded = room_in_host(prepared.recipe, split, initial.coca, world)
    notes += [note for note in (room, crowded) if note is not None]
    samples_at_peak = _samples_at_peak(prepared, world)
    node_bytes = bytes_of_a_save(prepared.recipe, split, initial.coca, world)
    engine = _engine(prepared, initial, world, notes)
    return Setup(
        preparation,
        prepared,
        resumed,
        crossing,
        remade,
        progress,
        positions,
        lanes,
        batches,
        engine,
        identity,
        samples_at_peak,
        local_folder,
        node_bytes,
        notes,
    )


def _beginning(before: Prepared, now: Prepared, remade: bool) -> str:
    """A line about what changes where a stage begins."""
    old, new = _facts(before), _facts(now)
    changes = [f"{key} {old[key]} → {value}" for key, value in new.items() if old[key] != value]
    if now.stage.begins_schedule:
        changes.append(f"a schedule begins, of lr {now.recipe.optim.lr:g}")
    if remade:
        changes.append("weights are made to fit")
    return f"{now.stage.name} begins: {'; '.join(changes) or 'nothing changes'}"


def _facts(prepared: Prepared) -> dict[str, Any]:
    """What stages may differ in, but for the learning rate, as it is in one of them."""
    values = prepared.recipe.model_dump(mode="json")
    sections = STAGE_KEYS.keys() - {"optim", "schedule"}
    facts = {key: values[name][key] for name in sorted(sections) for key in STAGE_KEYS[name]}
    config = prepared.config
    sizes = {"image_size": config.vision_cfg.image_size, "context_length": config.context_length}
    resolved = {**sizes, "patch_dropout": config.vision_cfg.patch_dropout}  # and told first
    return resolved | facts | resolved


def _engine(prepared: Prepared, initial: Initial, world: World, notes: list[str]) -> TrainEngine:
    """The model sharded, with as much recomputed as the stage's recipe says. A collective."""
    fitting, split = prepared.recipe, prepared.batch_split
    here = (_device(world), world.ranks_per_node)
    if "auto" in (fitting.engine.activation_checkpointing, fitting.engine.kept_graphs):
        fitting = world.on_first(lambda: fitted(prepared.recipe, split, *here)[0])
        notes += _chosen(prepared.recipe, fitting, split)
    recomputed = world.on_first(lambda: blocks_to_recompute(fitting, split))
    if recomputed:
        notes.append(f"recomputing {len(recomputed)} blocks to keep to the activation budget")
    teacher: Teacher | None = None
    if prepared.teaching is not None:
        cut = partial(teacher_is_cut, fitting, split, *here)
        teacher, note = prepared.teaching.make(fitting, world, cut)
        notes.append(note)
    about = (fitting, split, world, recomputed, teacher, initial.first)
    engine = TrainEngine(initial.coca, initial.logit_scale, *about)
    attention = own_attention(initial.coca, fitting.engine.precision)
    notes += [] if attention is None else [attention]
    return engine


def _chosen(recipe: Recipe, fitting: Recipe, split: BatchSplit) -> list[str]:
    """What `auto` has come to."""
    asked, found, notes = recipe.engine, fitting.engine, list[str]()
    if asked.activation_checkpointing == "auto":
        notes.append(f"activation_checkpointing auto is {found.activation_checkpointing}")
    if asked.kept_graphs == "auto" and split.accumulation > 1:
        kept = f"{found.kept_graphs} of {split.accumulation} micro-batches"
        notes.append(f"kept_graphs auto is {kept}")
    return notes


def _compare(preparation: Preparation, checkpoint: Path, progress: dict[str, Any]) -> list[str]:
    """See that a checkpoint is of this run, as it is in the stage of the checkpoint.

    Raises:
        UserError: it is of another run.
    """
    number, stages = progress.get("stage", 1), preparation.stages
    if number > len(stages):
        raise UserError(
            f"{checkpoint} is of stage {number}, and the recipe has {len(stages)}; finished stages "
            "stay in a run's recipe"
        )
    held = preparation.of(stages[number - 1])
    identity = preparation.identity(held.stage)
    about = (held.config, held.batch_split.lanes, held.stage)
    return compare(checkpoint, progress, identity, *about)


def _reached(recipe: Recipe, mirror: Mirror | NoMirror) -> int:
    """Steps that the checkpoint seems to have that the run will go on from; nothing is verified."""
    resume = recipe.checkpoint.resume
    found: Path | None = None
    if resume == "auto":
        found = find_checkpoint(recipe.run.folder / CHECKPOINTS)
        newest = max(mirror.names, default="")
        if found is None or found.name < newest:
            return step_of(newest) if newest else 0
    elif resume != "never":
        found = Path(resume)
    try:
        return 0 if found is None else int(read_progress(found)["step"])
    except (UserError, OSError):
        return 0  # it is looked at again, and closely


def _validation(
    recipe: Recipe, config: ModelConfig, tokenizer: Tokenizer, source: Source
) -> Validation:
    settings, labelled = recipe.eval, None
    if settings.zeroshot is not None:
        names = (settings.classnames, settings.templates)
        labelled = open_labelled([settings.zeroshot], recipe.data, *names)
    captions = config.multimodal_cfg is not None
    return Validation(source, tokenizer, settings, labelled, captions)


def _agreed_checkpoint(
    recipe: Recipe, world: World, mirror: Mirror | NoMirror, notes: list[str]
) -> Path | None:
    """The checkpoint the recipe asks for, whole; all ranks the same one, or none.

    Raises:
        AgreedError: the one asked for is damaged, or the run folder should be empty.
    """
    resume, parent = recipe.checkpoint.resume, recipe.run.folder / CHECKPOINTS
    world.on_first(lambda: sweep(parent))
    if resume == "auto":
        found = newest_intact(parent, world, notes)
        return mirror.fetch(parent, found, notes) or found
    if resume == "never":
        if world.on_first(lambda: find_checkpoint(parent)) is not None or mirror.names:
            key = "checkpoint.mirror" if mirror.names else "run.dir"
            place = recipe.checkpoint.mirror if mirror.names else recipe.run.folder
            raise AgreedError(
                f"{place} holds checkpoints already; choose another {key}, "
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
