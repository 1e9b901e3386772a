"""What a run tells: metrics.jsonl, TensorBoard, W&B, a progress bar or plain lines."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from coca_scale.engine.host import peak_bytes
from coca_scale.engine.ownership import Owner
from coca_scale.evaluation.captioning import draw_grid
from coca_scale.losses import LABELS
from coca_scale.recipe import Recipe
from coca_scale.recipe.run_folder import (
    BAD_SAMPLES,
    BAD_STEPS,
    METRICS,
    SHEETS,
    TENSORBOARD,
    VALIDATION,
)
from coca_scale.recipe.text import tell, visible
from coca_scale.training.appending import append, forget_after, warn_once
from coca_scale.training.tracking import Tracker
from coca_scale.training.validation import ValidationResult


class RunLog:
    """Writes the run folder's logs; on ranks other than 0 it does nothing."""

    def __init__(self, recipe: Recipe, steps: int, active: bool, owner: Owner) -> None:
        self._active = active
        self._owner = owner
        self._steps = steps
        self._losses = [name for name in LABELS if recipe.loss.learns(name)]
        self._folder = folder = recipe.run.folder
        self._writer: SummaryWriter | None = None
        self._tracker: Tracker | None = None
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        if active:
            folder.mkdir(parents=True, exist_ok=True)
            if recipe.log.tensorboard:
                _hush_writers()
                with self._tensorboard():
                    self._writer = SummaryWriter(str(folder / TENSORBOARD))
            if recipe.log.wandb is not None:
                self._tracker = Tracker(recipe, folder, self.say)

    def __enter__(self) -> RunLog:
        if self._active and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=8),  # the rest needs the 80 columns
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("starting", total=self._steps)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._writer is not None:
            with self._tensorboard():
                self._writer.close()
        if self._tracker is not None:
            self._tracker.close()

    def resume_at(self, step: int) -> None:
        """Forget what was written about steps after `step`, which will be run again."""
        if self._owner.holds():
            for name in (METRICS, VALIDATION, BAD_SAMPLES, BAD_STEPS):
                note = forget_after(self._folder / name, step)
                if note is not None:
                    self.say(note)

    def say(self, message: str) -> None:
        """One line for the person watching."""
        if self._active:
            message = visible(message)
            if self._bar is not None:
                self._bar.console.print(message, highlight=False, markup=False)
            else:
                tell(message)

    def metrics(self, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, scalars, and the progress display."""
        if not self._owner.holds():
            return
        append(self._folder / METRICS, json.dumps(values) + "\n")
        self._scalars("train", values["step"], values)
        known = {k: math.nan if v is None else v for k, v in values.items() if "loss" in k}
        losses = {name: known[f"{name}_loss"] for name in self._losses}
        if self._bar is not None:
            short = " ".join(f"{name} {value:.2f}" for name, value in losses.items())
            text = f"loss {known['loss']:.2f} ({short}) {values['samples_per_second']:.0f}/s"
            self._bar.update(self._task, completed=values["step"], description=text)
        else:
            parts = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
            text = (
                f"loss {known['loss']:.3f} = {parts}; {values['samples_per_second']:.0f} samples/s"
            )
            rate = values["samples_per_second"] / max(1, values["global_batch"])
            left = timedelta(seconds=round((self._steps - values["step"]) / max(rate, 1e-9)))
            self.say(f"step {values['step']}/{self._steps}: {text}; {left} left")

    def _scalars(self, group: str, step: int, values: Mapping[str, Any]) -> None:
        numbers = {
            f"{group}/{name}": value
            for name, value in values.items()
            if name != "step" and isinstance(value, int | float)
        }
        if self._tracker is not None:
            self._tracker.log(step, numbers)
        if self._writer is None:
            return
        with self._tensorboard():
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)

    @contextmanager
    def _tensorboard(self) -> Iterator[None]:
        """A disk that refuses its file costs TensorBoard the rest of the run, and no more."""
        try:
            yield
        except OSError as error:
            self._writer = None
            warn_once(self._folder / TENSORBOARD, error)

    def validation(self, step: int, result: ValidationResult) -> None:
        """A line of validation.jsonl, scalars, and a sheet of captioned pictures."""
        if not self._owner.holds():
            return
        scores = result.scores
        told = "; ".join(found.headline() for found in result.results if found.scores)
        self.say(f"validation at step {step}, {result.samples} pairs: {told}")
        for item in result.captioned[:3]:
            self.say(f"  «{item.picture.captions[0]}» captioned as «{item.captions[0]}»")
        line = {"step": step, "samples": result.samples, **scores}
        append(self._folder / VALIDATION, json.dumps(line) + "\n")
        self._scalars("val", step, scores)
        if not result.captioned:
            return
        try:
            self._draw(step, result)
        except OSError as error:
            warn_once(self._folder / SHEETS, error)

    def _draw(self, step: int, result: ValidationResult) -> None:
        sheet = self._folder / SHEETS / f"step_{step:08d}.png"
        sheet.parent.mkdir(exist_ok=True)
        draw_grid(result.captioned, sheet)
        if self._tracker is not None:
            self._tracker.picture(step, sheet)
        if self._writer is None:
            return
        images = torch.stack([item.picture.pixels for item in result.captioned])
        rows = [f"| {item.picture.captions[0]} | {item.captions[0]} |" for item in result.captioned]
        table = "\n".join(["| caption | generated |", "|---|---|", *rows])
        with self._tensorboard():
            self._writer.add_images("val/pictures", images, step)
            self._writer.add_text("val/captions", table, step)


@cache
def _hush_writers() -> None:
    """TensorBoard's thread tells its caller what the disk refused; no traceback besides."""
    hook = threading.excepthook

    def hushed(arguments: threading.ExceptHookArgs) -> None:
        writes = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (writes and isinstance(arguments.exc_value, OSError)):
            hook(arguments)

    threading.excepthook = hushed


def peak_memory_bytes() -> int:
    """Peak of this process: device memory where there is a GPU, resident memory otherwise."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return peak_bytes()
