"""The training loop."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from coca_scale.data.loader import LaneStates, StepBatch
from coca_scale.data.prefetch import Prefetcher, ReadyBatch
from coca_scale.engine.checkpoint import find_checkpoint
from coca_scale.engine.compute_clock import ComputeClock, Spans, equal_layers
from coca_scale.engine.ownership import Owner
from coca_scale.engine.train_engine import StepInFlight, StepResult
from coca_scale.engine.watchdog import NoWatchdog, Watchdog
from coca_scale.engine.world import World
from coca_scale.errors import AgreedError, UserError
from coca_scale.inference.export import export
from coca_scale.inference.load import load_model
from coca_scale.openclip.folder import what_reads
from coca_scale.recipe import Recipe
from coca_scale.recipe.exits import REQUEUE
from coca_scale.recipe.run_folder import CHECKPOINTS, EXPORT, PROFILE
from coca_scale.training.bad_steps import BadSteps, Rollback
from coca_scale.training.events import Event, append_event, job_of_slurm, last_logged, now
from coca_scale.training.garbage_collection import GarbageCollection
from coca_scale.training.local_saves import LocalSaves
from coca_scale.training.log import RunLog, peak_memory_bytes
from coca_scale.training.meter import Meter
from coca_scale.training.mirror import Mirror, NoMirror
from coca_scale.training.positions import Skip
from coca_scale.training.profiling import StepProfiler
from coca_scale.training.requests import Asked, Requests, Signals
from coca_scale.training.saving import Saver
from coca_scale.training.schedule import loss_weights_of, rate_of, weights_move
from coca_scale.training.setup import set_up
from coca_scale.training.skipped import SkipLog


@dataclass(frozen=True)
class _Behind:
    """A step that the engine was told to do: what is to be said of it when it is through."""

    number: int
    flight: StepInFlight
    spans: Spans
    lr: float
    keys: list[str]
    lanes: LaneStates


class Trainer:
    """A stage of a run, or what is left of it, from its recipe to its last checkpoint.

    A GPU has the next step before it when the host looks at the last one; a CPU is through anyway.
    """

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        watchdog: Watchdog | NoWatchdog | None = None,
        rollbacks: int = 0,
        skip: Skip | None = None,
        owner: Owner | None = None,
        signals: Signals | None = None,
        mirror: Mirror | NoMirror | None = None,
    ) -> None:
        """Prepare everything, resuming if the recipe says so.

        Args:
            recipe: what to do.
            world: the ranks.
            watchdog: limits the time of every phase; None limits nothing.
            rollbacks: how often a stretch of bad steps may raise `Rollback` from `run`.
            skip: where this rank's data goes on, and not where the checkpoint says.
            owner: of the run folder; None where nothing else trains into it.
            signals: to this process; None heeds none.
            mirror: of the run; None for a run that has none.

        Raises:
            AgreedError: the recipe does not fit the model, the data or the number of ranks, or
                weights cannot be loaded.
        """
        self.world = world
        self.watchdog = watchdog or NoWatchdog()
        self.signals = signals
        self.mirror = mirror or NoMirror()
        self.folder = recipe.run.folder
        self.step = 0
        self._going_back = skip is not None
        self._before: dict[str, Any] | None = None
        self.owner = owner or Owner(None, world.rank == 0)
        self.skips = SkipLog(world, self.owner, self.folder, recipe.data.max_bad_fraction)
        self.bad_steps = BadSteps(world, self.owner, self.folder, recipe.health, rollbacks)
        self._step_seconds = recipe.engine.step_timeout_minutes * 60
        self._slow_seconds = recipe.engine.save_timeout_minutes * 60
        with self.watchdog.phase("starting", recipe.engine.start_timeout_minutes * 60):
            self.setup = set_up(recipe, world, skip, self.mirror)
            world.set_timeout(max(self._step_seconds, self._slow_seconds) + 120)
        self.prepared, self.engine = self.setup.prepared, self.setup.engine
        self.recipe, self.stage = self.prepared.recipe, self.prepared.stage
        alone = world.size == 1  # and nobody is slower
        timed = [] if alone else equal_layers(self.engine.module, recipe.engine.zero_stage)
        self._clock = ComputeClock(timed, world.device)
        self.last_step = self.setup.preparation.stages[-1].last
        self.lanes = self.setup.lanes
        self._steps_ahead = 1 if world.device.type == "cuda" else 0
        self._behind: deque[_Behind] = deque()
        with self.watchdog.phase("loading the checkpoint", self._slow_seconds):
            world.agree(self._load)

    def close(self) -> None:
        """Free what the engine holds."""
        self.engine.close()

    def run(self) -> int | None:
        """Train to the end of the stage, or until asked to leave, and leave a checkpoint.

        Returns:
            Exit code: 0, or REQUEUE if the job is to be started again; None if another stage is to
            begin at that checkpoint.

        Raises:
            AgreedError: data cannot be used, too many steps are bad, the disk is full, or another
                job has taken the run folder over.
            Rollback: too many steps are bad, and the recipe wants to go back.
        """
        if self.signals is not None:
            self.signals.to_be_saved()
        log = self.world.agree(self._begin_log)
        minutes = self.recipe.checkpoint.every_minutes
        requests = Requests(self.folder, minutes, self.world.rank, self.signals)
        with log:
            self.mirror.say = log.say
            for note in self.setup.notes:
                log.say(note)
            self._tell_event("start", **job_of_slurm(), **self._beginning())
            if self.step < self.stage.last or self.setup.resumed is None:
                saver = self._make_saver(log)
                try:
                    asked = self._train(log, saver, requests)
                except (AgreedError, Rollback) as reason:
                    saver.finish()  # all ranks are here, and what was begun is worth having
                    # a run that goes back does so behind its local saves
                    saver.local.end(remove=isinstance(reason, Rollback))
                    if isinstance(reason, AgreedError):
                        self.mirror.wait()
                    raise
                saver.last(self.step)
                saver.local.end(remove=True)
                if asked.leave or asked.stop:
                    self._leave(log, asked)
                    return REQUEUE if asked.leave else 0
            if self.stage.number < self.stage.of:
                log.say(f"{self.stage.name} ends after step {self.step} of {self.last_step}")
                return None
            self._finish(log)
        return 0

    def _begin_log(self) -> RunLog:
        """What a run says of itself from its beginning."""
        if self.owner.holds():
            self.setup.preparation.write(self.prepared.tokenizer)
            self._before = last_logged(self.folder)
        log = RunLog(self.setup.preparation.run, self.last_step, self.world.rank == 0, self.owner)
        log.resume_at(self.step)
        return log

    def _train(self, log: RunLog, saver: Saver, requests: Requests) -> Asked:
        """Steps until the stage ends; what the run was asked for if that is why it ended."""
        recipe, steps = self.recipe, self.stage.last
        if recipe.model.pretrained is not None and self.step == 0:
            self._validate(log)  # what there is to lose
        meter = Meter(self.world, recipe.train.global_batch, recipe.health.straggler_factor)
        limit = max(self._step_seconds, recipe.engine.start_timeout_minutes * 60)  # compiles, reads
        samples = self.setup.batches
        assert samples is not None, "no step is left"
        span = recipe.log.profile_steps if self.world.rank == 0 else None
        with (
            closing(samples),
            closing(self._ahead(samples)) as batches,
            GarbageCollection(recipe.engine.gc_every_steps) as garbage,
            StepProfiler(span, self.folder / PROFILE, log.say) as profiler,
        ):
            while self.step < steps:
                number = self.step + 1
                with self.watchdog.phase(f"step {number}", limit), profiler.step(number):
                    batch, asked = self._next_batch(batches, meter, saver, requests)
                    if asked.leave or asked.stop:
                        self._look(meter, log)
                        return asked
                    if asked.save:
                        self._save(meter, log, saver, requests)
                    self._train_step(batch)
                    self._look(meter, log, self._steps_ahead)
                limit = self._step_seconds
                garbage.after_step(self.step)
                if saver.due(self.step) and self.step < steps:
                    self._save(meter, log, saver, requests)
                elif saver.local.due(self.step) and self.step < steps:
                    self._look(meter, log)
                    saver.local.save()
                every = recipe.eval.every_steps
                if (every is not None and self.step % every == 0) or self.step == steps:
                    self._look(meter, log)
                    self._validate(log)
                    meter.restart()
        return Asked()

    def _ahead(self, samples: Iterator[StepBatch]) -> Prefetcher:
        engine = self.engine
        return Prefetcher(samples, engine.lay_out, self.world.device, engine.lay_out_lesson)

    def _train_step(self, batch: ReadyBatch) -> None:
        lr = rate_of(self.setup.preparation.stages, self.step)
        seen = self.stage.samples_seen(self.step)
        share = batch.share
        weights = loss_weights_of(self.setup.preparation.stages, self.step)
        about = (lr, seen, share.share_indices, batch.lesson, weights)
        with self._clock.timing(self._is_logged(self.step + 1)) as spans:
            flight = self.engine.step(share.images, batch.captions, *about)
        self.step += 1
        self.lanes = share.lanes
        self._behind.append(_Behind(self.step, flight, spans, lr, share.keys, share.lanes))

    def _is_logged(self, number: int) -> bool:
        return number % self.recipe.log.every_steps == 0 or number == self.last_step

    def _look(self, meter: Meter, log: RunLog, ahead: int = 0) -> None:
        """Judge and log all steps but the last `ahead`, waiting for them. A collective.

        Raises:
            AgreedError: too many steps are bad.
            Rollback: likewise; `lanes` are behind the step it is about.
        """
        while len(self._behind) > ahead:
            step = self._behind.popleft()
            result = step.flight.result()
            meter.steps += 1
            try:
                note = self.bad_steps.look(step.number, result, step.keys)
            except Rollback:
                self.lanes = step.lanes
                raise
            if note is not None:
                log.say(note)
            if self._is_logged(step.number):
                times, notes = meter.read(step.spans.seconds())
                log.metrics(self._metrics(step, result, times))
                for note in notes:
                    log.say(note)
                self.skips.flush(step.number)

    def _save(self, meter: Meter, log: RunLog, saver: Saver, requests: Requests) -> None:
        """Save what all steps so far have come to. A collective."""
        self._look(meter, log)
        saver.save()
        requests.saved()

    def _next_batch(
        self, batches: Iterator[ReadyBatch], meter: Meter, saver: Saver, requests: Requests
    ) -> tuple[ReadyBatch, Asked]:
        """This rank's next batch once every rank has one, and what any rank was asked for.

        The one place where ranks agree on what comes next; saves end here.

        Raises:
            AgreedError: the data of a rank cannot be used, too many samples are bad, or another
                job has taken the run folder over.
        """
        batch, error = None, None
        with meter.waiting_for_data():
            try:
                batch = next(batches)
                self.owner.require()
            except UserError as fault:
                error = str(fault)
        here = self.skips.add(batch.share.skipped) if batch is not None else (0, 0)
        mine = requests.poll()
        asks = (error is not None, mine.leave, mine.stop, mine.save)
        flags = (*asks, self.mirror.poll(), saver.written_here, saver.local.written_here)
        with meter.waiting_for_others():
            sums = self.world.sum(*here, *(float(flag) for flag in flags))
        bad, filtered, failures, leave, stop, save, copied, written, written_locally = sums
        if failures:
            self.world.fail_together(error)
        asked = Asked(leave=leave > 0, stop=stop > 0, save=save > 0)
        requests.answered(asked)
        if asked.leave and self.signals is not None:
            self.signals.agreed(self.world.gather(self.signals.reason))
        assert batch is not None
        good = self.stage.samples_seen(self.step + 1)
        self.skips.total(int(bad), int(filtered), good, self.step + 1)
        if copied == self.world.size:
            self.mirror.finish()
        if written == self.world.size:
            saver.finish()
        if written_locally == self.world.size:
            saver.local.finish()
        return batch, asked

    def _tell_event(self, event: Event, **values: Any) -> None:
        if self.owner.holds():
            append_event(self.folder, event, step=self.step, **values)

    def _beginning(self) -> dict[str, Any]:
        """What a start is: where it is to end, and how far the run had come before."""
        values = {"last_step": self.last_step, "hosts": dict(Counter(self.world.hosts))}
        if self.stage.of > 1:
            values["stage"] = self.stage.number
        if self._before is not None:
            values["before"] = self._before
        return {**values, "going_back": True} if self._going_back else values

    def _validate(self, log: RunLog) -> None:
        if self.prepared.validation is not None:
            with self.watchdog.phase("validating", self._slow_seconds):
                log.validation(self.step, self.prepared.validation.run(self.engine))

    def _leave(self, log: RunLog, asked: Asked) -> None:
        """End before the last step, with the last checkpoint in the mirror as well.

        Raises:
            AgreedError: it cannot be had there, and the run was to end for good.
        """
        if asked.leave:
            self.mirror.wait()  # what fails has been said
        else:
            self._mirror_last()
        back = ", to be started again" if asked.leave else " as asked"
        self._tell_event("end", how="left" if asked.leave else "stopped")
        log.say(f"left after step {self.step} of {self.last_step}{back}")
        try:
            self.mirror.put_logs()
        except AgreedError as error:
            log.say(f"warning: {error}")

    def _mirror_last(self) -> None:
        parent = self.folder / CHECKPOINTS
        self.mirror.last(self.world.on_first(lambda: find_checkpoint(parent)))

    def _finish(self, log: RunLog) -> None:
        with self.watchdog.phase("exporting", self._slow_seconds):
            obstacle = self.world.on_first(self._export)
        if obstacle is not None:
            log.say(f"{self.folder / EXPORT} is for coca-scale alone: {obstacle}")
        elif (newer := what_reads(self.engine.module.config)) is not None:
            log.say(f"{self.folder / EXPORT}: {newer}")
        if self.skips.causes:
            log.say(f"skipped samples: {self.skips.summary()}")
        self._mirror_last()
        self.mirror.put_export()
        self._tell_event("end", how="finished")
        self.mirror.put_logs()
        log.say(f"finished {self.step} steps; run folder {self.folder}")

    def _export(self) -> str | None:
        """Write the end of the run as a model folder; returns why OpenCLIP cannot have it."""
        self.owner.require()
        final = find_checkpoint(self.folder / CHECKPOINTS) or self.setup.resumed
        return export(load_model(str(final)), self.folder / EXPORT)

    def _metrics(self, step: _Behind, result: StepResult, times: dict[str, Any]) -> dict[str, Any]:
        values = {
            "step": step.number,
            "time": now(),
            "samples_seen": self.stage.samples_seen(step.number),
            "loss": result.loss,
            **{f"{name}_loss": value for name, value in result.losses.items()},
            "lr": step.lr,
            "grad_norm": result.grad_norm,
            "logit_scale": result.logit_scale,
            **({} if result.logit_bias is None else {"logit_bias": result.logit_bias}),
            "global_batch": self.recipe.train.global_batch,
            **times,
            "peak_memory_bytes": peak_memory_bytes(),
            "skipped_steps": self.bad_steps.skipped,
            "loss_spikes": self.bad_steps.spikes,
            "bad_samples": self.skips.bad,
            "filtered_samples": self.skips.filtered,
        }
        if weights_move(self.setup.preparation.stages):
            values |= {f"{name}_weight": weight for name, weight in result.weights.items()}
        if self.stage.of > 1:
            values["stage"] = self.stage.number
        if self.setup.samples_at_peak is not None:
            values["mfu"] = times["samples_per_second_per_rank"] / self.setup.samples_at_peak
        return {k: v if _writable(v) else None for k, v in values.items()}

    def _make_saver(self, log: RunLog) -> Saver:
        """A collective."""
        section = self.recipe.checkpoint
        about = (self._progress, log, self.owner, self.watchdog, self._slow_seconds)
        local = LocalSaves(self.engine, self.setup.local_folder, self.recipe, *about)
        local.begin(self.setup.node_bytes)
        parent = self.folder / CHECKPOINTS
        return Saver(self.engine, parent, section, *about, self.mirror, local)

    def _progress(self) -> dict[str, Any]:
        """What a checkpoint keeps of the loop. A collective."""
        self.skips.flush(self.step)
        lanes = {lane: at for part in self.world.gather(self.lanes) for lane, at in part.items()}
        return {
            "step": self.step,
            "samples_seen": self.stage.samples_seen(self.step),
            "stage": self.stage.number,
            "bad_steps": self.bad_steps.state(),
            "skips": self.skips.state(),
            "lanes": [list(lanes[lane]) for lane in sorted(lanes)],
            "left": self.setup.positions.left,
            "model_cfg": self.prepared.config.to_dict(),
            "identity": asdict(self.setup.identity),
        }

    def _load(self) -> None:
        """Optimizer and counters, from the checkpoint or from the start.

        Raises:
            UserError: it does not fit this run, the same on every rank.
        """
        resumed = self.setup.resumed
        if resumed is None:
            return
        started = time.perf_counter()
        progress = self.setup.progress
        resharded = self.engine.load_state(resumed, self.setup.remade)
        self.step = progress["step"]
        self.bad_steps.load(progress["bad_steps"], other_losses=self.setup.crossing)
        self.skips.load(progress["skips"])
        seconds = time.perf_counter() - started
        how = " into another layout" if resharded else ""
        self.setup.notes.append(
            f"resumed from {resumed} at step {self.step}; loaded in {seconds:.1f} s{how}"
        )


def _writable(value: Any) -> bool:
    """Whether JSON has this value: it has neither infinity nor NaN."""
    return not isinstance(value, float) or math.isfinite(value)
