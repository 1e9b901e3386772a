"""Preflight of a recipe: everything that can be seen to be wrong before a job is queued."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from coca_scale.data.bucket import Bucket
from coca_scale.data.loader import decode_sample
from coca_scale.data.sample import BadSample, Source, causes_text
from coca_scale.data.shards import ShardSource, missing_numbers, missing_shards
from coca_scale.data.sources import open_source, storage_options, train_crop
from coca_scale.data.stored_features import StoredFeatures, are_stored
from coca_scale.data.tokens import Tokenizer, make_tokenizer
from coca_scale.engine.host import memory_bytes
from coca_scale.errors import UserError
from coca_scale.evaluation.zeroshot import open_labelled
from coca_scale.inference.load import pretrained_name
from coca_scale.model import CoCa, ModelConfig
from coca_scale.model.freeze import freeze
from coca_scale.model.weights import require_resizable
from coca_scale.planning.fit import plan_run
from coca_scale.planning.gpus import GPUS
from coca_scale.planning.teacher import require_same_size, teacher_width
from coca_scale.recipe import BatchSplit, Recipe
from coca_scale.recipe.data import WeightedShards
from coca_scale.recipe.stages import recipes_of

TRIED_SAMPLES = 64


@dataclass
class Report:
    """What was found; `faults` are what would stop or spoil a run."""

    fine: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add(self, other: Report, prefix: str) -> None:
        """Take in what another one has, behind a prefix."""
        self.fine += [prefix + line for line in other.fine]
        self.notes += [prefix + line for line in other.notes]
        self.faults += [prefix + line for line in other.faults]

    def text(self) -> str:
        """A line per finding, faults last."""
        marked = (("ok", self.fine), ("note", self.notes), ("fault", self.faults))
        return "\n".join(f"{mark:<6}{line}" for mark, lines in marked for line in lines)


def check(recipe: Recipe, ranks: int, device_bytes: int | None = None) -> Report:
    """Look at recipe, model, data and memory, without training.

    Args:
        recipe: a valid recipe.
        ranks: processes of the planned job.
        device_bytes: memory per process; found out where None.
    """
    report = Report()
    early = (tracking_fault(recipe), local_fault(recipe))
    report.faults += [fault for fault in early if fault is not None]
    stages = recipes_of(recipe)
    for (_, before), (name, stage) in itertools.pairwise(stages.items()):
        _sizes(before, stage, name, report)
    for name, stage in stages.items():
        found = _stage(stage, ranks, device_bytes, with_validation=name == [*stages][-1])
        report.add(found, f"{name}: " if name else "")
    _zeroshot(recipe, report)
    _folder(recipe.run.folder, report)
    _mirror(recipe, report)
    return report


def _sizes(before: Recipe, after: Recipe, name: str, report: Report) -> None:
    """See that the weights of one stage can be those of the next."""
    try:
        require_resizable(*(ModelConfig.from_recipe(r.model) for r in (before, after)))
    except UserError as error:
        report.faults.append(f"{name}: model: {error}")


def _stage(recipe: Recipe, ranks: int, device_bytes: int | None, with_validation: bool) -> Report:
    """What is found of a run that has this recipe from its beginning to its end."""
    report = Report()
    batch = _batch(recipe, ranks, report)
    config = _model(recipe, report)
    taught = config is None or _teacher(recipe, config, report)
    if config is not None and batch is not None and taught:
        _memory(recipe, ranks, device_bytes, report)
    tokenizer = _tokenizer(config, recipe, report) if config is not None else None
    _data("train", recipe.data.train, recipe, batch, config, tokenizer, report)
    if with_validation and recipe.data.val is not None:
        _data("val", recipe.data.val, recipe, batch, config, tokenizer, report)
    return report


def tracking_fault(recipe: Recipe) -> str | None:
    """Why `log.wandb` of a recipe cannot be followed here; None if it can."""
    if recipe.log.wandb is not None and find_spec("wandb") is None:
        return "log.wandb needs the package: pip install 'coca-scale[wandb]'"
    return None


def local_fault(recipe: Recipe) -> str | None:
    """Why `checkpoint.local_dir` of a recipe can be no folder of every node; None if it can."""
    place = recipe.checkpoint.local_dir
    if place is not None and not Path(place).is_absolute():
        return f"checkpoint.local_dir {place} is to be a folder of every node: begin with /"
    return None


def caption_fault(recipe: Recipe, config: ModelConfig) -> str | None:
    """What a recipe asks of captions that its model cannot do; None if it can."""
    if config.multimodal_cfg is not None:
        return None
    for key, asked in (
        ("data.caption_captions", recipe.data.caption_captions),
        ("loss.caption_parallel", recipe.loss.caption_parallel),
    ):
        if asked:
            return f"{key} is for models that write captions, and {recipe.model.name} is a CLIP"
    return None


def _batch(recipe: Recipe, ranks: int, report: Report) -> BatchSplit | None:
    try:
        batch = BatchSplit.from_recipe(recipe, ranks)
    except UserError as error:
        report.faults.append(f"batch: {error}")
        return None
    report.fine.append(
        f"batch: {batch.global_batch:,} = {batch.ranks} ranks × {batch.accumulation} accumulation "
        f"× {batch.micro_batch} micro-batch; {batch.lanes} lanes, {batch.lanes_per_rank} per rank"
    )
    if recipe.data.workers > batch.lanes_per_rank:
        report.notes.append(
            f"batch: a rank reads {batch.lanes_per_rank} lanes, so only that many of "
            f"data.workers={recipe.data.workers} have work"
        )
    return batch


def _model(recipe: Recipe, report: Report) -> ModelConfig | None:
    try:
        config = ModelConfig.from_recipe(recipe.model)
        if (fault := caption_fault(recipe, config)) is not None:
            raise UserError(fault)
        with torch.device("meta"):
            model = CoCa(config)
            freeze(model, recipe.model, recipe.loss)
    except UserError as error:
        report.faults.append(f"model: {error}")
        return None
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    report.fine.append(f"model: {recipe.model.name}, {total:,} parameters, {trained:,} trained")
    if recipe.model.pretrained is not None:
        report.notes.append(f"model: weights {pretrained_name(recipe.model)} were not read")
    return config


def _teacher(recipe: Recipe, config: ModelConfig, report: Report) -> bool:
    """Whether there is what the recipe wants to learn from, and it suits the model and the data."""
    section = recipe.loss.distill
    if section.teacher is None:
        return True
    try:
        require_same_size(section, teacher_width(section), config)
        if are_stored(section.teacher):
            stored = StoredFeatures(Path(section.teacher))
            stored.check(open_source(recipe.data.train, recipe.data, recipe.run.seed))
            line = f"features of {stored.facts.model}, stored for all shards"
        else:
            line = f"{section.teacher} runs beside the model; its weights were not read"
    except UserError as error:
        report.faults.append(f"teacher: {error}")
        return False
    report.fine.append(f"teacher: {line}")
    return True


def _memory(recipe: Recipe, ranks: int, device_bytes: int | None, report: Report) -> None:
    """What a rank needs, against what is said to be there, or is here."""
    gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    on_cpu = device_bytes is None and not gpus and ranks <= cores
    elsewhere = device_bytes is not None or not (gpus or on_cpu)
    try:
        _, _, plan = plan_run(recipe, ranks, GPUS["cpu" if on_cpu else "a100-80gb"], gpus or ranks)
    except UserError as error:
        report.faults.append(f"memory: {error}")
        return
    if not on_cpu:
        if not elsewhere:
            device_bytes = int(torch.cuda.get_device_properties(0).total_memory)
        _fits("a GPU", plan.total_bytes, device_bytes, "", recipe, report)
    if elsewhere and device_bytes is None:
        report.notes.append("memory: not compared with a GPU, as there is none; --device-gigabytes")
    host = plan.host
    parts = (
        f" ({host.process / 1e9:.2f} the process itself, {host.loaders / 1e9:.2f} loaders, "
        f"{host.building / 1e9:.2f} while the model is built, {host.training / 1e9:.2f} training; "
        f"a save copies {host.saving / 1e9:.2f} where there is room, or waits for the disk)"
    )
    limit = None if elsewhere else memory_bytes() // min(ranks, gpus or ranks)
    _fits("the host", host.total, limit, parts, recipe, report)


def _fits(
    where: str, need: int, limit: int | None, parts: str, recipe: Recipe, report: Report
) -> None:
    of = "" if limit is None else f" of {limit / 1e9:,.1f} GB"
    text = f"memory: {need / 1e9:,.2f} GB{of} of {where} per rank{parts}"
    if limit is None or need <= limit:
        report.fine.append(text)
        return
    more = "more ranks" if where != "the host" else "fewer ranks on a node"
    hint = more if recipe.engine.zero_stage == 3 else f"engine.zero_stage=3 or {more}"
    report.faults.append(f"{text}; use {hint}")


def _tokenizer(config: ModelConfig, recipe: Recipe, report: Report) -> Tokenizer | None:
    start = recipe.model.pretrained
    try:
        tokenizer = make_tokenizer(config, Path(start) if start is not None else None)
    except UserError as error:
        report.faults.append(f"tokenizer: {error}")
        return None
    report.fine.append(
        f"tokenizer: {tokenizer.vocab_size:,} tokens, context of {tokenizer.context_length}"
    )
    return tokenizer


def _data(
    name: str,
    spec: str | Sequence[str | WeightedShards],
    recipe: Recipe,
    batch: BatchSplit | None,
    config: ModelConfig | None,
    tokenizer: Tokenizer | None,
    report: Report,
) -> None:
    label = f"data.{name}"
    try:
        source = open_source(spec, recipe.data, recipe.run.seed)
    except UserError as error:
        report.faults.append(f"{label}: {error}")
        return
    if isinstance(source, ShardSource):
        _shards(label, source, batch, report)
    try:
        source.check()
    except UserError as error:
        missing = missing_shards(source.urls) if isinstance(source, ShardSource) else []
        if not missing:
            report.faults.append(f"{label}: {error}")
        if not isinstance(source, ShardSource) or len(missing) in (0, len(source.urls)):
            return
    count = source.count()
    if count is not None:
        report.fine.append(f"{label}: {count:,} samples per epoch")
        if name == "train" and batch is not None and count < batch.lanes:
            report.faults.append(
                f"{label}: {count} samples for {batch.lanes} lanes; lower data.lanes or "
                "train.global_batch"
            )
    elif name == "train" and recipe.train.epochs and recipe.data.train_samples is None:
        report.faults.append(
            f"{label}: train.epochs needs data.train_samples, or a manifest beside the shards "
            "(coca-scale data inspect SHARDS --write-manifest)"
        )
    if config is not None and tokenizer is not None:
        _samples(label, source, recipe, config, tokenizer, report)


def _zeroshot(recipe: Recipe, report: Report) -> None:
    settings = recipe.eval
    if settings.zeroshot is None:
        return
    names = (settings.classnames, settings.templates)
    try:
        labelled = open_labelled([settings.zeroshot], recipe.data, *names)
    except UserError as error:
        report.faults.append(f"eval.zeroshot: {error}")
        return
    report.fine.append(f"eval.zeroshot: {len(labelled.classes.names):,} classes")


def _shards(label: str, source: ShardSource, batch: BatchSplit | None, report: Report) -> None:
    urls = source.urls
    missing = missing_shards(urls)
    if missing:
        report.faults.append(
            f"{label}: {len(missing)} of {len(urls)} shards are missing, first: {missing[0]}"
        )
    gaps = missing_numbers(urls)
    if gaps:
        report.notes.append(f"{label}: no shard with number {_few(gaps)} among the others")
    report.fine.append(
        f"{label}: {len(urls):,} shards, "
        f"{'sizes known' if source.epochs.counted else 'sizes unknown (no manifest.json)'}"
    )
    if label == "data.train" and batch is not None and not source.epochs.counted:
        if len(urls) < batch.lanes:
            report.notes.append(
                f"{label}: {len(urls)} shards for {batch.lanes} lanes: lanes share shards, and "
                "each reads all of its shard; a manifest (data inspect --write-manifest) cuts them"
            )
        elif len(urls) % batch.lanes:
            report.notes.append(
                f"{label}: {len(urls)} shards do not deal evenly to {batch.lanes} lanes, so some "
                "samples come more often than others; a manifest evens that out"
            )


def _samples(
    label: str,
    source: Source,
    recipe: Recipe,
    config: ModelConfig,
    tokenizer: Tokenizer,
    report: Report,
) -> None:
    """Decode the first samples."""
    crop = train_crop(recipe.data, config.vision_cfg.image_size, config.preprocess_cfg)
    rng = np.random.default_rng(0)
    skipped: Counter[str] = Counter()
    good = captions = cut = 0
    for sample in itertools.islice(source.ordered(0, 1), TRIED_SAMPLES):
        try:
            if isinstance(sample, BadSample):
                raise sample
            decode_sample(sample, tokenizer, crop, rng)
        except BadSample as bad:
            skipped[bad.cause] += 1
            continue
        good += 1
        texts = [text for text, _ in (*sample.captions, *(sample.targets or ()))]
        captions += len(texts)
        cut += sum(map(tokenizer.cuts, texts))
    causes = causes_text(skipped)
    if not good:
        report.faults.append(f"{label}: none of the first samples can be used ({causes})")
        return
    report.fine.append(f"{label}: decoded {good} of the first {good + skipped.total()} samples")
    if skipped:
        report.notes.append(f"{label}: left out of the first samples: {causes}")
    if cut:
        report.notes.append(
            f"{label}: {cut} of the first {captions} captions have more tokens than the context of "
            f"{tokenizer.context_length} and are cut; model.context_length sets it"
        )


def _folder(folder: Path, report: Report) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if there.is_dir() and os.access(there, os.W_OK):
        report.fine.append(f"run folder: {folder}")
    else:
        report.faults.append(f"run folder: {there} cannot be written to; set run.dir")


def _mirror(recipe: Recipe, report: Report) -> None:
    url = recipe.checkpoint.mirror
    if url is None:
        return
    try:
        Bucket(url, storage_options(recipe.data)).check()
    except UserError as error:
        report.faults.append(f"checkpoint.mirror: {error}")
    else:
        report.fine.append(f"checkpoint.mirror: {url}, written, listed and read")


def _few(numbers: Sequence[str]) -> str:
    more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
    return ", ".join(numbers[:3]) + more
