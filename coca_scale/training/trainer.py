"""The training loop."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from coca_scale.data.lengths import balanced_order
from coca_scale.data.loader import (
    LaneStates,
    StepBatch,
    TrainDataset,
    TrainLoader,
    deal_lanes,
)
from coca_scale.data.prefetch import Prefetcher
from coca_scale.data.sample import DataError, Source
from coca_scale.data.sources import open_source, train_crop
from coca_scale.data.tokens import FastTokenizer, make_tokenizer
from coca_scale.engine.checkpoint import (
    find_checkpoint,
    read_progress,
    save_checkpoint,
    verify_checkpoint,
)
from coca_scale.engine.core import StepResult, TrainEngine
from coca_scale.engine.export import export
from coca_scale.engine.launch import AgreedError, World
from coca_scale.engine.loading import load_model
from coca_scale.recipe import BatchPlan, Recipe, dump_recipe
from coca_scale.training.initial import initial_model, model_config
from coca_scale.training.log import RunLog, peak_memory_bytes
from coca_scale.training.schedule import learning_rate, total_steps
from coca_scale.training.skipped import SkipLog
from coca_scale.training.validation import Validation


class Trainer:
    """One run, from its recipe to its last checkpoint."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        """Prepare everything, resuming if the recipe says so.

        Raises:
            AgreedError: the recipe does not fit the model, the data or the number of ranks, or
                weights cannot be loaded.
        """
        self.recipe = recipe
        self.world = world
        self.step = 0
        self.skipped_steps = 0
        self.skips = SkipLog(world, recipe.run.folder, recipe.data.max_bad_fraction)
        self.lanes: LaneStates = {}
        self.notes: list[str] = []
        world.agree(_message_of(self._prepare))
        self.resumed = self._agreed_checkpoint()
        coca, logit_scale = initial_model(recipe, self.config, self.resumed, world, self.notes)
        self.engine = TrainEngine(coca, logit_scale, recipe, self.plan, world)
        world.agree(_message_of(self._load))

    def _prepare(self) -> None:
        """Everything that needs no other rank.

        Raises:
            ValueError: a fault of the recipe or the data.
        """
        recipe, world = self.recipe, self.world
        if recipe.engine.precision == "fp16" and world.device.type == "cpu":
            raise ValueError("engine.precision=fp16 needs a GPU; use fp32 or bf16 here")
        self.plan = BatchPlan.from_recipe(recipe, world.size)
        self.config = model_config(recipe.model)
        start = recipe.model.pretrained
        self.tokenizer = make_tokenizer(self.config, Path(start) if start is not None else None)
        self.folder = recipe.run.folder
        self.source = open_source(recipe.data.train, recipe.data, recipe.run.seed)
        self.validation = self._make_validation()
        if world.rank == 0:
            for source in self._sources():
                source.check()
        samples_per_epoch = recipe.data.train_samples or self.source.count()
        self.steps = total_steps(recipe.train, samples_per_epoch)

    def run(self) -> None:
        """Train to the end and leave a final checkpoint."""
        resumed = self.resumed
        active = self.world.rank == 0
        if active:
            self._write_recipe()
        log = RunLog(self.folder, self.steps, self.recipe.log.tensorboard, active)
        log.resume_at(self.step)
        with log:
            if resumed is not None:
                log.say(f"resumed from {resumed} at step {self.step}")
            for note in self.notes:
                log.say(note)
            if resumed is None or self.step < self.steps:
                self._train(log)
                final = self._save()
            else:
                final = resumed
            if active:
                obstacle = export(load_model(str(final)), self.folder / "export")
                if obstacle is not None:
                    log.say(f"{self.folder / 'export'} is for coca-scale alone: {obstacle}")
            self.world.barrier()
            if self.skips.causes:
                log.say(f"skipped samples: {self.skips.summary()}")
            log.say(f"finished {self.step} steps; run folder {self.folder}")

    def _train(self, log: RunLog) -> None:
        if self.recipe.model.pretrained is not None and self.step == 0:
            self._validate(log)  # what there is to lose
        with closing(Prefetcher(iter(self._loader()), self.world.device)) as batches:
            self._steps(batches, log)

    def _steps(self, batches: Iterator[StepBatch], log: RunLog) -> None:
        meter = _Meter(self.plan.global_batch)
        every = self.recipe.checkpoint.every_steps
        while self.step < self.steps:
            batch = self._next_batch(batches, meter)
            lr = learning_rate(self.step, self.steps, self.recipe.optim.lr, self.recipe.schedule)
            seen = self.step * self.plan.global_batch
            result = self.engine.step(batch.images, batch.tokens, lr, seen, batch.places)
            self.step += 1
            self.lanes = batch.lanes
            self.skipped_steps += not result.applied
            if not math.isfinite(result.loss):
                raise AgreedError(
                    f"the loss is not finite at step {self.step} "
                    f"(contrastive {result.contrastive_loss}, caption {result.caption_loss}); "
                    "lower optim.lr, or look at the samples of this step"
                )
            meter.steps += 1
            if self.step % self.recipe.log.every_steps == 0 or self.step == self.steps:
                log.metrics(self._metrics(result, lr, meter))
                self.skips.flush(self.step)
            last = self.step == self.steps
            if every is not None and self.step % every == 0 and not last:
                self._save()
            eval_every = self.recipe.eval.every_steps
            due = eval_every is not None and self.step % eval_every == 0
            if due or last:
                self._validate(log)
                meter.restart()

    def _validate(self, log: RunLog) -> None:
        if self.validation is not None:
            log.validation(self.step, self.validation.run(self.engine))

    def _next_batch(self, batches: Iterator[StepBatch], meter: _Meter) -> StepBatch:
        """This rank's next batch, once every rank has one.

        Raises:
            AgreedError: the data of a rank cannot be used, or too many samples are bad.
        """
        started = time.perf_counter()
        batch, error = None, None
        try:
            batch = next(batches)
        except DataError as fault:
            error = str(fault)
        meter.waited_seconds += time.perf_counter() - started
        here = self.skips.add(batch.skipped) if batch is not None else (0, 0)
        failures, bad, filtered = self.world.sum(float(error is not None), *here)
        if failures:
            self.world.agree(error)
        assert batch is not None
        good = (self.step + 1) * self.plan.global_batch
        self.skips.total(int(bad), int(filtered), good, self.step + 1)
        return batch

    def _metrics(self, result: StepResult, lr: float, meter: _Meter) -> dict[str, Any]:
        rate, wait = meter.read()
        return {
            "step": self.step,
            "samples_seen": self.step * self.plan.global_batch,
            "loss": result.loss,
            "contrastive_loss": result.contrastive_loss,
            "caption_loss": result.caption_loss,
            "lr": lr,
            "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,
            "logit_scale": result.logit_scale,
            "global_batch": self.plan.global_batch,
            "samples_per_second": rate,
            "samples_per_second_per_rank": rate / self.plan.ranks,
            "data_wait_fraction": wait,
            "peak_memory_bytes": peak_memory_bytes(),
            "skipped_steps": self.skipped_steps,
            "bad_samples": self.skips.bad,
            "filtered_samples": self.skips.filtered,
        }

    def _loader(self) -> TrainLoader:
        dataset = TrainDataset(
            source=self.source,
            tokenizer=self.tokenizer,
            crop=train_crop(self.recipe.data, self.config.vision_cfg.image_size),
            seed=self.recipe.run.seed,
            lanes=self.plan.lanes,
            samples_per_lane=self.plan.samples_per_lane,
            states=self.lanes,
        )
        arrange = partial(balanced_order, micro_batch=self.plan.micro_batch)
        several = self.plan.accumulation > 1
        return TrainLoader(dataset, self.recipe.data.workers, arrange if several else None)

    def _make_validation(self) -> Validation | None:
        data, ev = self.recipe.data, self.recipe.eval
        if data.val is None:
            return None
        self._val_source = open_source(data.val, data, self.recipe.run.seed)
        size = self.config.vision_cfg.image_size
        return Validation(self._val_source, self.tokenizer, size, ev.samples, ev.captions)

    def _sources(self) -> list[Source]:
        return [self.source] if self.validation is None else [self.source, self._val_source]

    def _agreed_checkpoint(self) -> Path | None:
        """The checkpoint the recipe asks for; all ranks the same one, or none."""
        choices: list[Path | None] = []
        self.world.agree(
            _message_of(lambda: choices.append(self._choose())) if self.world.rank == 0 else None
        )
        chosen = self.world.gather(choices[0] if choices else None)[0]
        assert chosen is None or isinstance(chosen, Path)
        return chosen

    def _choose(self) -> Path | None:
        """The checkpoint to start from, verified.

        Raises:
            ValueError: it is damaged, or the run folder is not empty and should be.
        """
        resume = self.recipe.checkpoint.resume
        found = find_checkpoint(self.folder / "checkpoints")
        if resume == "never" and found is not None:
            raise ValueError(
                f"{self.folder} holds checkpoints already; choose another run.dir, "
                "or checkpoint.resume=auto to go on from there"
            )
        chosen = found if resume == "auto" else None if resume == "never" else Path(resume)
        if chosen is not None:
            verify_checkpoint(chosen)
        return chosen

    def _load(self) -> None:
        """Optimizer, counters and this rank's lanes, from the checkpoint or from the start.

        Raises:
            ValueError: it was written by another layout, the same on every rank.
        """
        saved = None
        if self.resumed is not None:
            progress = read_progress(self.resumed)
            saved = progress["lanes"]
            self.engine.load_state(self.resumed)
            self.step = progress["step"]
            self.skipped_steps = progress["skipped_steps"]
            self.skips.load(progress["skips"])
        self.lanes = deal_lanes(self.plan.lanes, self.world.rank, self.world.size, saved)

    def _save(self) -> Path:
        self.skips.flush(self.step)
        lanes: dict[int, Any] = {}
        for part in self.world.gather(self.lanes):
            assert isinstance(part, dict)
            lanes |= part
        progress = {
            "step": self.step,
            "samples_seen": self.step * self.plan.global_batch,
            "skipped_steps": self.skipped_steps,
            "skips": self.skips.state(),
            "lanes": [list(lanes[lane]) for lane in sorted(lanes)],
            "model_cfg": self.config.to_dict(),
        }
        keep = self.recipe.checkpoint.keep
        return save_checkpoint(self.engine, self.folder / "checkpoints", progress, keep)

    def _write_recipe(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "recipe.yaml").write_text(dump_recipe(self.recipe))
        if isinstance(self.tokenizer, FastTokenizer):
            self.tokenizer.save(self.folder)
        packages = ("torch", "deepspeed", "open_clip_torch", "coca-scale")
        versions = {"python": platform.python_version(), **{p: version(p) for p in packages}}
        about = {"versions": versions, "git_commit": _git_commit(), "ranks": self.world.size}
        (self.folder / "versions.json").write_text(json.dumps(about, indent=1) + "\n")


class _Meter:
    """Throughput and the share of time spent waiting for data since the last reading."""

    def __init__(self, global_batch: int) -> None:
        self._global_batch = global_batch
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self._started = time.perf_counter()
        self.steps = 0
        self.waited_seconds = 0.0

    def read(self) -> tuple[float, float]:
        """Samples per second over all ranks, and the waiting share; begins a new interval."""
        seconds = time.perf_counter() - self._started
        rate, wait = self.steps * self._global_batch / seconds, self.waited_seconds / seconds
        self.restart()
        return rate, min(1.0, wait)


def _message_of(action: Callable[[], None]) -> str | None:
    """Run `action`; the text of its ValueError, for all ranks to agree on."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return None


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
