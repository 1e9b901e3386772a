"""The training loop."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from coca_scale.data.lengths import balanced_order
from coca_scale.data.loader import (
    LaneStates,
    StepBatch,
    TrainDataset,
    TrainLoader,
    deal_lanes,
)
from coca_scale.data.prefetch import Prefetcher
from coca_scale.data.sample import DataError, Position, Source
from coca_scale.data.sources import open_source, train_crop
from coca_scale.data.tokens import FastTokenizer, make_tokenizer
from coca_scale.engine.checkpoint import (
    CheckpointWriter,
    find_checkpoint,
    fitting_state,
    newest_intact,
    read_progress,
    sweep,
    verify_together,
)
from coca_scale.engine.train_engine import StepResult, TrainEngine
from coca_scale.engine.watchdog import NoWatchdog, Watchdog
from coca_scale.engine.world import World
from coca_scale.errors import AgreedError, UserError
from coca_scale.evaluation.zeroshot import open_labelled
from coca_scale.inference.export import export
from coca_scale.inference.load import load_model
from coca_scale.model import ModelConfig
from coca_scale.planning.check import tracking_fault
from coca_scale.planning.costs import blocks_to_recompute, model_flops
from coca_scale.planning.gpus import peak_flops
from coca_scale.recipe import BatchSplit, Recipe, dump_recipe, run_folder
from coca_scale.recipe.exits import REQUEUE
from coca_scale.recipe.total_steps import total_steps
from coca_scale.training.bad_steps import BadSteps, Rollback
from coca_scale.training.garbage_collection import GarbageCollection
from coca_scale.training.initial import initial_model
from coca_scale.training.log import RunLog, peak_memory_bytes
from coca_scale.training.meter import Meter
from coca_scale.training.preflight import preflight, room_for_checkpoints
from coca_scale.training.profiling import StepProfiler
from coca_scale.training.requests import Asked, Requests
from coca_scale.training.saving import Saver
from coca_scale.training.schedule import learning_rate
from coca_scale.training.skipped import SkipLog
from coca_scale.training.validation import Validation


class Trainer:
    """One run, from its recipe to its last checkpoint."""

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        watchdog: Watchdog | NoWatchdog | None = None,
        rollbacks: int = 0,
        lanes: LaneStates | None = None,
    ) -> None:
        """Prepare everything, resuming if the recipe says so.

        Args:
            recipe: what to do.
            world: the ranks.
            watchdog: limits the time of every phase; None limits nothing.
            rollbacks: how often a stretch of bad steps may raise `Rollback` from `run`.
            lanes: where this rank's data goes on, and not where the checkpoint says.

        Raises:
            AgreedError: the recipe does not fit the model, the data or the number of ranks, or
                weights cannot be loaded.
        """
        self.recipe = recipe
        self.world = world
        self.watchdog = watchdog or NoWatchdog()
        self.step = 0
        self.folder = recipe.run.folder
        self.skips = SkipLog(world, self.folder, recipe.data.max_bad_fraction)
        self.bad_steps = BadSteps(world, self.folder, recipe.health, rollbacks)
        self.lanes: LaneStates = {}
        self.notes: list[str] = []
        engine = recipe.engine
        self._samples_at_peak: float | None = None
        self._step_seconds = engine.step_timeout_minutes * 60
        self._slow_seconds = engine.save_timeout_minutes * 60
        with self.watchdog.phase("starting", engine.start_timeout_minutes * 60):
            world.agree(self._prepare)
            preflight(world, self.folder, self._sources())
            self.resumed = self._agreed_checkpoint()
            model = initial_model(recipe, self.config, self.resumed, world, self.notes)
            room = room_for_checkpoints(self.folder, sum(p.numel() for p in model[0].parameters()))
            self.notes += [room] if room is not None else []
            self._samples_at_peak = self._find_samples_at_peak()
            recomputed = self._agreed_blocks()
            self.engine = TrainEngine(*model, recipe, self.batch_split, world, recomputed)
            world.set_timeout(max(self._step_seconds, self._slow_seconds) + 120)
        with self.watchdog.phase("loading the checkpoint", self._slow_seconds):
            world.agree(self._load)
        if lanes is not None:
            self.lanes = lanes

    def _prepare(self) -> None:
        """Everything that needs no other rank.

        Raises:
            UserError: a fault of the recipe or the data.
        """
        recipe, world = self.recipe, self.world
        if recipe.engine.precision == "fp16" and world.device.type == "cpu":
            raise UserError("engine.precision=fp16 needs a GPU; use fp32 or bf16 here")
        if (fault := tracking_fault(recipe)) is not None:
            raise UserError(fault)
        self.batch_split = BatchSplit.from_recipe(recipe, world.size)
        self.config = ModelConfig.from_recipe(recipe.model)
        start = recipe.model.pretrained
        self.tokenizer = make_tokenizer(self.config, Path(start) if start is not None else None)
        self.source = open_source(recipe.data.train, recipe.data, recipe.run.seed)
        self.validation = self._make_validation()
        samples_per_epoch = recipe.data.train_samples or self.source.count()
        self.steps = total_steps(recipe.train, samples_per_epoch)

    def close(self) -> None:
        """Free what the engine holds."""
        self.engine.close()

    def run(self) -> int:
        """Train to the end, or until asked to leave, and leave a checkpoint.

        Returns:
            Exit code: 0, or REQUEUE if the job is to be started again.

        Raises:
            AgreedError: data cannot be used, too many steps are bad, or the disk is full.
            Rollback: too many steps are bad, and the recipe wants to go back.
        """
        active = self.world.rank == 0
        if active:
            self._write_recipe()
        log = RunLog(self.recipe, self.steps, active)
        log.resume_at(self.step)
        requests = Requests(self.folder, self.recipe.checkpoint.every_minutes, self.world.rank)
        with log, requests:
            for note in self.notes:
                log.say(note)
            saver = self._make_saver(log)
            if self.step < self.steps or self.resumed is None:
                try:
                    asked = self._train(log, saver, requests)
                except (AgreedError, Rollback):
                    saver.finish()  # all ranks are here, and what was begun is worth having
                    raise
                saver.last(self.step)
                if asked.leave or asked.stop:
                    back = ", to be started again" if asked.leave else " as asked"
                    log.say(f"left after step {self.step} of {self.steps}{back}")
                    return REQUEUE if asked.leave else 0
            self._finish(log)
        return 0

    def _finish(self, log: RunLog) -> None:
        with self.watchdog.phase("exporting", self._slow_seconds):
            obstacle = self.world.on_first(self._export)
            if obstacle is not None:
                log.say(f"{self.folder / 'export'} is for coca-scale alone: {obstacle}")
        if self.skips.causes:
            log.say(f"skipped samples: {self.skips.summary()}")
        log.say(f"finished {self.step} steps; run folder {self.folder}")

    def _export(self) -> str | None:
        """Write the end of the run as a model folder; returns why OpenCLIP cannot have it."""
        final = find_checkpoint(self.folder / run_folder.CHECKPOINTS) or self.resumed
        return export(load_model(str(final)), self.folder / run_folder.EXPORT)

    def _train(self, log: RunLog, saver: Saver, requests: Requests) -> Asked:
        """Steps until the end; what the run was asked for if that is why it ended."""
        if self.recipe.model.pretrained is not None and self.step == 0:
            self._validate(log)  # what there is to lose
        recipe = self.recipe
        meter = Meter(self.world, self.batch_split.global_batch, recipe.health.straggler_factor)
        limit = max(self._step_seconds, recipe.engine.start_timeout_minutes * 60)  # compiles, reads
        loader = Prefetcher(iter(self._loader()), self.world.device)
        span = recipe.log.profile_steps if self.world.rank == 0 else None
        with (
            closing(loader) as batches,
            GarbageCollection(recipe.engine.gc_every_steps) as garbage,
            StepProfiler(span, self.folder / run_folder.PROFILE, log.say) as profiler,
        ):
            while self.step < self.steps:
                number = self.step + 1
                with self.watchdog.phase(f"step {number}", limit), profiler.step(number):
                    batch, asked = self._next_batch(batches, meter, saver, requests)
                    if asked.leave or asked.stop:
                        return asked
                    self._train_step(batch, meter, log)
                limit = self._step_seconds
                garbage.after_step(self.step)
                if saver.due(self.step) and self.step < self.steps:
                    saver.save()
                    requests.saved()
                every = recipe.eval.every_steps
                if (every is not None and self.step % every == 0) or self.step == self.steps:
                    self._validate(log)
                    meter.restart()
        return Asked()

    def _train_step(self, batch: StepBatch, meter: Meter, log: RunLog) -> None:
        lr = learning_rate(self.step, self.steps, self.recipe.optim.lr, self.recipe.schedule)
        seen = self.step * self.batch_split.global_batch
        result = self.engine.step(batch.images, batch.tokens, lr, seen, batch.share_indices)
        self.step += 1
        self.lanes = batch.lanes
        meter.steps += 1
        note = self.bad_steps.look(self.step, result, batch.keys)
        if note is not None:
            log.say(note)
        if self.step % self.recipe.log.every_steps == 0 or self.step == self.steps:
            times, note = meter.read()
            log.metrics(self._metrics(result, lr, times))
            if note is not None:
                log.say(note)
            self.skips.flush(self.step)

    def _validate(self, log: RunLog) -> None:
        if self.validation is not None:
            with self.watchdog.phase("validating", self._slow_seconds):
                log.validation(self.step, self.validation.run(self.engine))

    def _next_batch(
        self, batches: Iterator[StepBatch], meter: Meter, saver: Saver, requests: Requests
    ) -> tuple[StepBatch, Asked]:
        """This rank's next batch once every rank has one, and what any rank was asked for.

        The one place where ranks agree on what comes next; saves begin and end here.

        Raises:
            AgreedError: the data of a rank cannot be used, or too many samples are bad.
        """
        batch, error = None, None
        with meter.waiting_for_data():
            try:
                batch = next(batches)
            except DataError as fault:
                error = str(fault)
        here = self.skips.add(batch.skipped) if batch is not None else (0, 0)
        mine = requests.poll()
        flags = (error is not None, mine.leave, mine.stop, mine.save, saver.written_here)
        with meter.waiting_for_others():
            sums = self.world.sum(*here, *(float(flag) for flag in flags))
        bad, filtered, failures, leave, stop, save, written = sums
        if failures:
            self.world.fail_together(error)
        asked = Asked(leave=leave > 0, stop=stop > 0, save=save > 0)
        requests.answered(asked)
        assert batch is not None
        good = (self.step + 1) * self.batch_split.global_batch
        self.skips.total(int(bad), int(filtered), good, self.step + 1)
        if written == self.world.size:
            saver.finish()
        if asked.save and not (asked.leave or asked.stop):
            saver.save()
            requests.saved()
        return batch, asked

    def _metrics(self, result: StepResult, lr: float, times: dict[str, Any]) -> dict[str, Any]:
        values = {
            "step": self.step,
            "samples_seen": self.step * self.batch_split.global_batch,
            "loss": result.loss,
            **{f"{name}_loss": value for name, value in result.losses.items()},
            "lr": lr,
            "grad_norm": result.grad_norm,
            "logit_scale": result.logit_scale,
            "global_batch": self.batch_split.global_batch,
            **times,
            "peak_memory_bytes": peak_memory_bytes(),
            "skipped_steps": self.bad_steps.skipped,
            "loss_spikes": self.bad_steps.spikes,
            "bad_samples": self.skips.bad,
            "filtered_samples": self.skips.filtered,
        }
        if self._samples_at_peak is not None:
            values["mfu"] = times["samples_per_second_per_rank"] / self._samples_at_peak
        return {k: v if _writable(v) else None for k, v in values.items()}

    def _loader(self) -> TrainLoader:
        dataset = TrainDataset(
            source=self.source,
            tokenizer=self.tokenizer,
            crop=train_crop(self.recipe.data, self.config.vision_cfg.image_size),
            seed=self.recipe.run.seed,
            lanes=self.batch_split.lanes,
            samples_per_lane=self.batch_split.samples_per_lane,
            states=self.lanes,
        )
        arrange = partial(balanced_order, micro_batch=self.batch_split.micro_batch)
        several = self.batch_split.accumulation > 1
        return TrainLoader(dataset, self.recipe.data.workers, arrange if several else None)

    def _make_validation(self) -> Validation | None:
        data, ev = self.recipe.data, self.recipe.eval
        if data.val is None:
            return None
        self._val_source = open_source(data.val, data, self.recipe.run.seed)
        labelled = None
        if ev.zeroshot is not None:
            labelled = open_labelled([ev.zeroshot], data, ev.classnames, ev.templates)
        captions = self.config.multimodal_cfg is not None
        return Validation(self._val_source, self.tokenizer, ev, labelled, captions)

    def _sources(self) -> list[Source]:
        return [self.source] if self.validation is None else [self.source, self._val_source]

    def _find_samples_at_peak(self) -> float | None:
        """Samples per second if this device computed all the time, None for one not known."""
        on_gpu = self.world.device.type == "cuda"
        flops = peak_flops(torch.cuda.get_device_name() if on_gpu else platform.machine())
        if self.world.rank != 0 or flops is None:
            return None
        return flops / model_flops(self.recipe, self.batch_split)

    def _agreed_blocks(self) -> list[str]:
        """Blocks that are recomputed as a whole to keep to the budget, as rank 0 finds.

        Raises:
            AgreedError: the budget is too small.
        """
        found = self.world.on_first(lambda: blocks_to_recompute(self.recipe, self.batch_split))
        if found:
            self.notes.append(f"recomputing {len(found)} blocks to keep to the activation budget")
        return found

    def _agreed_checkpoint(self) -> Path | None:
        """The checkpoint the recipe asks for, whole; all ranks the same one, or none.

        Raises:
            AgreedError: the one asked for is damaged, or the run folder should be empty.
        """
        resume, parent = self.recipe.checkpoint.resume, self.folder / run_folder.CHECKPOINTS
        self.world.on_first(lambda: sweep(parent))
        if resume == "auto":
            return newest_intact(parent, self.world, self.notes)
        if resume == "never":
            if self.world.on_first(lambda: find_checkpoint(parent)) is not None:
                raise AgreedError(
                    f"{self.folder} holds checkpoints already; choose another run.dir, "
                    "or checkpoint.resume=auto to go on from there"
                )
            return None
        verify_together(Path(resume), self.world)
        return Path(resume)

    def _load(self) -> None:
        """Optimizer, counters and this rank's lanes, from the checkpoint or from the start.

        Raises:
            UserError: it does not fit this run, the same on every rank.
        """
        saved = None
        if self.resumed is not None:
            started = time.perf_counter()
            progress = read_progress(self.resumed)
            saved = progress["lanes"]
            scratch = self.folder / run_folder.CHECKPOINTS
            with fitting_state(self.resumed, self.engine.layout, scratch, self.world) as universal:
                self.engine.load_state(self.resumed, universal)
            self.step = progress["step"]
            self.bad_steps.load(progress["bad_steps"])
            self.skips.load(progress["skips"])
            seconds = time.perf_counter() - started
            how = " after changing its layout" if universal is not None else ""
            self.notes.append(
                f"resumed from {self.resumed} at step {self.step}; loaded in {seconds:.1f} s{how}"
            )
        self.lanes = deal_lanes(self.batch_split.lanes, self.world.rank, self.world.size, saved)

    def _make_saver(self, log: RunLog) -> Saver:
        section = self.recipe.checkpoint
        parent = self.folder / run_folder.CHECKPOINTS
        writer = CheckpointWriter(self.engine, parent, section.keep, section.keep_every_steps)
        return Saver(writer, section, self._progress, log, self.watchdog, self._slow_seconds)

    def _progress(self) -> dict[str, Any]:
        """What a checkpoint keeps of the loop. A collective."""
        self.skips.flush(self.step)
        lanes: dict[int, Position] = {}
        for part in self.world.gather(self.lanes):
            lanes |= part
        return {
            "step": self.step,
            "samples_seen": self.step * self.batch_split.global_batch,
            "bad_steps": self.bad_steps.state(),
            "skips": self.skips.state(),
            "lanes": [list(lanes[lane]) for lane in sorted(lanes)],
            "model_cfg": self.config.to_dict(),
        }

    def _write_recipe(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / run_folder.RECIPE).write_text(dump_recipe(self.recipe))
        if isinstance(self.tokenizer, FastTokenizer):
            self.tokenizer.save(self.folder)
        packages = ("torch", "deepspeed", "open_clip_torch", "coca-scale")
        versions = {"python": platform.python_version(), **{p: version(p) for p in packages}}
        about = {"versions": versions, "git_commit": _git_commit(), "ranks": self.world.size}
        (self.folder / run_folder.VERSIONS).write_text(json.dumps(about, indent=1) + "\n")


def _writable(value: Any) -> bool:
    """Whether JSON has this value: it has neither infinity nor NaN."""
    return not isinstance(value, float) or math.isfinite(value)


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
