"""The training loop."""

from __future__ import annotations

import json
import math
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from coca_scale.data.loader import (
    LaneStates,
    StepBatch,
    TrainDataset,
    TrainLoader,
    deal_lanes,
)
from coca_scale.data.sample import DataError, Source
from coca_scale.data.sources import open_source
from coca_scale.data.tokens import make_tokenizer
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
from coca_scale.model import CoCa, LogitScale, load_model_config
from coca_scale.recipe import BatchPlan, Recipe, dump_recipe
from coca_scale.training.log import RunLog, peak_memory_bytes
from coca_scale.training.schedule import learning_rate, total_steps
from coca_scale.training.validation import Validation

MIN_SAMPLES_FOR_BAD_FRACTION = 256


class Trainer:
    """One run, from its recipe to its last checkpoint."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        """Prepare everything but the weights of a resumed run.

        Raises:
            AgreedError: the recipe does not fit the model, the data or the number of ranks.
        """
        self.recipe = recipe
        self.world = world
        self.step = 0
        self.bad: Counter[str] = Counter()
        self.skipped_steps = 0
        self.lanes: LaneStates = {}
        world.agree(_message_of(self._prepare))
        torch.manual_seed(recipe.run.seed)
        self.engine = TrainEngine(CoCa(self.config), LogitScale(), recipe, self.plan, world)

    def _prepare(self) -> None:
        """Everything that needs no other rank.

        Raises:
            ValueError: a fault of the recipe or the data.
        """
        recipe, world = self.recipe, self.world
        if recipe.engine.precision == "fp16" and world.device.type == "cpu":
            raise ValueError("engine.precision=fp16 needs a GPU; use fp32 or bf16 here")
        self.plan = BatchPlan.from_recipe(recipe, world.size)
        self.config = load_model_config(recipe.model.name).resized(
            recipe.model.image_size, recipe.model.context_length
        )
        self.tokenizer = make_tokenizer(self.config)
        self.folder = recipe.run.folder
        self.source = open_source(recipe.data.train, recipe.data, recipe.run.seed)
        self.validation = self._make_validation()
        if world.rank == 0:
            for source in self._sources():
                source.check()
        samples_per_epoch = recipe.data.train_samples or self.source.count()
        self.steps = total_steps(recipe.train, samples_per_epoch)

    def run(self) -> None:
        """Train to the end, resuming if the recipe says so, and leave a final checkpoint."""
        resumed = self._resume()
        active = self.world.rank == 0
        if active:
            self._write_recipe()
        log = RunLog(self.folder, self.steps, self.recipe.log.tensorboard, active)
        log.resume_at(self.step)
        with log:
            if resumed is not None:
                log.say(f"resumed from {resumed} at step {self.step}")
            if resumed is None or self.step < self.steps:
                self._train(log)
                final = self._save()
            else:
                final = resumed
            if active:
                export(load_model(str(final)), self.folder / "export")
            self.world.barrier()
            log.say(f"finished {self.step} steps; run folder {self.folder}")

    def _train(self, log: RunLog) -> None:
        batches = iter(self._loader())
        meter = _Meter(self.plan.global_batch)
        every = self.recipe.checkpoint.every_steps
        while self.step < self.steps:
            batch = self._next_batch(batches, meter)
            lr = learning_rate(self.step, self.steps, self.recipe.optim.lr, self.recipe.schedule)
            result = self.engine.step(batch.images, batch.tokens, lr)
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
            last = self.step == self.steps
            if every is not None and self.step % every == 0 and not last:
                self._save()
            eval_every = self.recipe.eval.every_steps
            due = eval_every is not None and self.step % eval_every == 0
            if self.validation is not None and (due or last):
                log.validation(self.step, self.validation.run(self.engine))
                meter.restart()

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
        found = sum(batch.bad.values()) if batch is not None else 0
        failures, bad = self.world.sum(float(error is not None), found)
        if failures:
            self.world.agree(error)
        assert batch is not None
        if bad:
            for part in self.world.gather(batch.bad):
                assert isinstance(part, Counter)
                self.bad += part
            self._check_bad_fraction()
        return batch

    def _check_bad_fraction(self) -> None:
        bad = sum(self.bad.values())
        seen = bad + (self.step + 1) * self.plan.global_batch
        limit = self.recipe.data.max_bad_fraction
        if seen >= MIN_SAMPLES_FOR_BAD_FRACTION and bad > limit * seen:
            causes = ", ".join(f"{n} × {cause}" for cause, n in self.bad.most_common())
            raise AgreedError(
                f"{bad} of {seen} samples are unusable ({causes}), more than "
                f"data.max_bad_fraction={limit} allows"
            )

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
            "bad_samples": sum(self.bad.values()),
        }

    def _loader(self) -> TrainLoader:
        dataset = TrainDataset(
            source=self.source,
            tokenizer=self.tokenizer,
            image_size=self.config.vision_cfg.image_size,
            crop_scale_min=self.recipe.data.crop_scale_min,
            seed=self.recipe.run.seed,
            lanes=self.plan.lanes,
            samples_per_lane=self.plan.samples_per_lane,
            states=self.lanes,
        )
        return TrainLoader(dataset, self.recipe.data.workers)

    def _make_validation(self) -> Validation | None:
        data, ev = self.recipe.data, self.recipe.eval
        if data.val is None:
            return None
        self._val_source = open_source(data.val, data, self.recipe.run.seed)
        size = self.config.vision_cfg.image_size
        return Validation(self._val_source, self.tokenizer, size, ev.samples, ev.captions)

    def _sources(self) -> list[Source]:
        return [self.source] if self.validation is None else [self.source, self._val_source]

    def _resume(self) -> Path | None:
        """Load the checkpoint the recipe asks for; all ranks the same one, or none."""
        choices: list[Path | None] = []
        self.world.agree(
            _message_of(lambda: choices.append(self._choose())) if self.world.rank == 0 else None
        )
        chosen = self.world.gather(choices[0] if choices else None)[0]
        assert chosen is None or isinstance(chosen, Path)
        self.world.agree(_message_of(lambda: self._load(chosen)))
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

    def _load(self, checkpoint: Path | None) -> None:
        """Weights, optimizer, counters and this rank's lanes, from `checkpoint` or from the start.

        Raises:
            ValueError: it was written by another layout, the same on every rank.
        """
        saved = None
        if checkpoint is not None:
            progress = read_progress(checkpoint)
            saved = progress["lanes"]
            self.engine.load_state(checkpoint)
            self.step = progress["step"]
            self.skipped_steps = progress["skipped_steps"]
            self.bad = Counter(progress["bad"])
        self.lanes = deal_lanes(self.plan.lanes, self.world.rank, self.world.size, saved)

    def _save(self) -> Path:
        lanes: dict[int, Any] = {}
        for part in self.world.gather(self.lanes):
            assert isinstance(part, dict)
            lanes |= part
        progress = {
            "step": self.step,
            "samples_seen": self.step * self.plan.global_batch,
            "skipped_steps": self.skipped_steps,
            "bad": dict(self.bad),
            "lanes": [list(lanes[lane]) for lane in sorted(lanes)],
            "model_cfg": self.config.to_openclip(),
        }
        keep = self.recipe.checkpoint.keep
        return save_checkpoint(self.engine, self.folder / "checkpoints", progress, keep)

    def _write_recipe(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "recipe.yaml").write_text(dump_recipe(self.recipe))
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
