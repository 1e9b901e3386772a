"""How a run stands, from its files alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, Literal

from coca_scale.errors import UserError
from coca_scale.recipe.load import read_sections, recipe_from_dict
from coca_scale.recipe.lock import WATCH_SECONDS, Seen
from coca_scale.recipe.run_folder import RECIPE
from coca_scale.recipe.section import MAX_STEPS
from coca_scale.recipe.stages import stages_of
from coca_scale.reports.run_files import Event, Line, Pulse, RunFiles, iso, seconds_of

State = Literal[
    "empty", "starting", "running", "stalled", "left", "stopped", "finished", "failed", "lost"
]
Standing = tuple[State, str, float | None]  # a sentence about it, and since when
RECENT_LINES = 50  # of metrics.jsonl, for what holds now
POINTS = 40  # of a curve
STALLED_INTERVALS = 5.0
LONGEST_SECONDS = 1e9  # of a step
STALLED_SECONDS = 120.0  # at least: between two lines there may be a save or a validation
_ENDS: dict[str | None, tuple[State, str]] = {
    "finished": ("finished", ""),
    "stopped": ("stopped", "somebody asked for it"),
    "left": ("left", "saved, to be started again"),
}


@dataclass(frozen=True)
class Start:
    """A start of a run.

    Attributes:
        time: of it, ISO 8601; None if its line does not say.
        step: at which it went on.
        why: it came again, as far as files tell; None of the first one and of a new stage.
        job: of SLURM.
        restart: how often SLURM had started that job before.
        launch: how often its ranks were started since then.
        lost_seconds: between the last logged step before and this start.
        repeated_steps: that were logged before, and are run once more.
    """

    time: str | None
    step: int
    why: str | None
    job: str | None
    restart: int | None
    launch: int | None
    lost_seconds: float
    repeated_steps: int


@dataclass(frozen=True)
class Save:
    """The last checkpoint of a kind, and the failures since then.

    Attributes:
        kind: shared (of the run folder), local (on the nodes) or mirror (in a bucket).
        step: that it is of; None if none succeeded.
        time: when that was told, ISO 8601.
        bytes: of its files; of several that are told together the mean, as are the seconds.
        seconds: from its begin to its end.
        blocked_seconds: of these, that training waited.
        failures: of later ones.
        failure: why the last of them failed.
    """

    kind: str
    step: int | None
    time: str | None
    bytes: int | None
    seconds: float | None
    blocked_seconds: float | None
    failures: int
    failure: str | None


@dataclass(frozen=True)
class Waiting:
    """Shares of time, 0 to 1: recent ones, but for `restarts`.

    Attributes:
        data: that ranks wait for their next batch, on the average.
        data_worst_rank: of the rank that waits most.
        others: that a rank waits for the one that arrives last.
        saves: that training waits for checkpoints.
        restarts: of the whole run, lost between starts and by steps that were run once more.
    """

    data: float | None
    data_worst_rank: float | None
    others: float | None
    saves: float | None
    restarts: float | None


@dataclass(frozen=True)
class RunState:
    """How a run stands; None where its files do not say.

    Attributes:
        run: name of the folder.
        folder: as it was given.
        state: empty (nothing is logged and nobody there), starting, running, stalled, left (to be
            started again), stopped, finished, failed, or lost: it ended without a word.
        about: a sentence about that; empty where there is nothing to say.
        since: when it began, ISO 8601; of running and stalled ones, when the last line was written.
        step: the last one that is logged.
        last_step: where the run is to end.
        stage: of a run in stages.
        samples_seen: so far.
        seconds_left: of training, at the recent rate.
        seconds_per_step: recent, with saves and validations.
        samples_per_second: recent.
        mfu: recent model FLOPs utilization.
        losses: the last ones, by their names in metrics.jsonl.
        curves: of the losses and `samples_per_second`: the end of metrics.jsonl in few points.
        validation: numbers of the last line of validation.jsonl.
        waiting: for what.
        slowest_rank: that others waited for last, with its host.
        slow_device: rank whose device computes longest, with its host.
        slow_device_times: as long as the median.
        peak_memory_bytes: of rank 0.
        bad_samples: so far.
        skipped_steps: so far, as losses or gradients were not finite.
        last_skipped_step: the last of them.
        loss_spikes: so far.
        saves: the last one of each kind.
        checkpoint: name of the newest one on the shared file system.
        starts: of the run, the last one at the end.
        lost_seconds: to starts that came again, with the steps that they repeated.
        repeated_steps: by them.
        damaged_lines: that cannot be read.
    """

    run: str
    folder: str
    state: State
    about: str
    since: str | None
    step: int
    last_step: int | None
    stage: int | None
    samples_seen: int | None
    seconds_left: float | None
    seconds_per_step: float | None
    samples_per_second: float | None
    mfu: float | None
    losses: dict[str, float | None]
    curves: dict[str, list[float]]
    validation: dict[str, float]
    waiting: Waiting
    slowest_rank: str | None
    slow_device: str | None
    slow_device_times: float | None
    peak_memory_bytes: int | None
    bad_samples: int | None
    skipped_steps: int | None
    last_skipped_step: int | None
    loss_spikes: int | None
    saves: list[Save]
    checkpoint: str | None
    starts: list[Start]
    lost_seconds: float
    repeated_steps: int
    damaged_lines: int

    def json(self) -> dict[str, Any]:
        """Plain data by these names."""
        return asdict(self)


def read_state(folder: Path, pulse: Pulse, now: float, running: float) -> RunState:
    """How the run in a folder stands.

    Args:
        folder: of the run.
        pulse: of the same folder, from the looks before.
        now: seconds since 1970, by this machine.
        running: seconds of a clock that nobody sets.

    Raises:
        UserError: it is no run folder.
    """
    if not (folder / RECIPE).is_file():
        raise UserError(f"{folder} is no run: it has no recipe.yaml")
    owner = pulse.look(now, running)
    files = RunFiles.of(folder)
    starts = _starts(files.events)
    last = files.metrics[-1] if files.metrics else Line(step=starts[-1].step if starts else 0)
    last_step = _last_step(files.events, folder)
    recent = _recent(files)
    per_step = _seconds_per_step(recent)
    state, about, since = _standing(files, owner, last_step, now)
    repeated = sum(start.repeated_steps for start in starts)
    lost = sum(start.lost_seconds for start in starts) + repeated * (per_step or 0.0)
    left = None
    if last_step is not None and per_step is not None:
        left = max(0, last_step - last.step) * per_step
    return RunState(
        run=folder.resolve().name,
        folder=str(folder),
        state=state,
        about=about,
        since=None if since is None else iso(since),
        step=last.step,
        last_step=last_step,
        stage=last.whole("stage"),
        samples_seen=last.whole("samples_seen"),
        seconds_left=left,
        seconds_per_step=per_step,
        samples_per_second=_median(_numbers(recent, "samples_per_second")),
        mfu=_median(_numbers(recent, "mfu")),
        losses={name: last.number(name) for name in last.losses},
        curves=_curves(files.metrics),
        validation=_scores(files.validation),
        waiting=_waiting(files, recent, per_step, lost),
        slowest_rank=_rank(last, "slowest") if last.number("straggler_seconds") else None,
        slow_device=_rank(last, "compute_slowest"),
        slow_device_times=last.number("compute_slowdown"),
        peak_memory_bytes=last.whole("peak_memory_bytes"),
        bad_samples=last.whole("bad_samples"),
        skipped_steps=last.whole("skipped_steps"),
        last_skipped_step=files.bad_steps[-1].step if files.bad_steps else None,
        loss_spikes=last.whole("loss_spikes"),
        saves=_saves(files.events),
        checkpoint=files.checkpoint,
        starts=starts,
        lost_seconds=lost,
        repeated_steps=repeated,
        damaged_lines=files.damaged,
    )


def _standing(
    files: RunFiles, owner: tuple[Seen | None, bool], last_step: int | None, now: float
) -> Standing:
    event = next((e for e in reversed(files.events) if e.event != "save"), None)
    if event is not None and event.event != "start":
        if _taken_again(event, owner):
            return "starting", "somebody has it again", None
        if event.event == "failure":
            return "failed", _failure(event), event.seconds
        how = event.text("how")
        return *_ENDS.get(how, ("stopped", how or "")), event.seconds
    at = _written(files)
    seen, alive = owner
    if not alive:
        return *_without_owner(files, seen, last_step), at
    began = event.seconds if event is not None else None
    if at is None or (began is not None and at < began):
        return "starting", "no step is logged yet", began
    silence, usual = now - at, _interval(files.metrics)
    if silence > max(STALLED_SECONDS, STALLED_INTERVALS * (usual or 0.0)):
        often = "" if usual is None else f", which usually takes {usual:.0f} s"
        return "stalled", f"no new line{often}", at
    return "running", "", at


def _taken_again(end: Event, owner: tuple[Seen | None, bool]) -> bool:
    """Whether a process has the folder that is not the one which ended."""
    seen, alive = owner
    if seen is None or not alive:
        return False
    if end.event == "end":  # who ends in order releases it
        return True
    return seen.changed / 1e9 > (end.seconds or 0.0) + WATCH_SECONDS  # ranks die within that


def _without_owner(files: RunFiles, seen: Seen | None, last_step: int | None) -> tuple[State, str]:
    """Of a run that nobody trains, and that does not say how it ended."""
    if files.metrics and last_step is not None and files.metrics[-1].step >= last_step:
        return "finished", "as its last step is logged"
    if seen is None:
        known = files.metrics or files.events
        return ("lost", "nobody trains it") if known else ("empty", "nothing is logged")
    if seen.released:
        return "failed", "it ended in order, with an error; its output says which"
    return "lost", f"no sign of life of {seen.holder or 'its owner'}"


def _failure(event: Event) -> str:
    rank, host, what = event.whole("rank"), event.text("host"), event.text("what")
    names = ("" if rank is None else f"rank {rank}", host or "")
    where = " on ".join(name for name in names if name)
    if what is None:
        return f"{where or 'a rank'} failed"
    return f"{where}: {what}" if where and where not in what else what


def _starts(events: Iterable[Event]) -> list[Start]:
    found: list[Start] = []
    before: Event | None = None  # the last start, failure or end
    for event in events:
        if event.event == "start":
            why = _why(event, before)
            found.append(_start(event, why))
        if event.event != "save":
            before = event
    return found


def _start(event: Event, why: str | None) -> Start:
    lost, repeated = 0.0, 0
    logged = event.get("before")
    if isinstance(logged, dict) and why is not None:
        at, began, step = seconds_of(logged.get("time")), event.seconds, logged.get("step")
        lost = max(0.0, began - at) if at is not None and began is not None else 0.0
        repeated = max(0, min(step, MAX_STEPS) - event.step) if isinstance(step, int) else 0
    return Start(
        time=event.text("time"),
        step=event.step,
        why=why,
        job=event.text("job"),
        restart=event.whole("restart"),
        launch=event.whole("launch"),
        lost_seconds=lost,
        repeated_steps=repeated,
    )


def _why(event: Event, before: Event | None) -> str | None:
    """Why a run began once more; None where it did not, or a new stage does."""
    if event.get("going_back") is True:
        return "back behind steps that went wrong"
    if before is None:
        return None
    if before.event == "start" and (before.whole("stage") or 0) < (event.whole("stage") or 0):
        return None
    if before.event == "failure":
        return _failure(before)
    if (told := event.text("why")) is not None:
        return told
    if before.event == "end":
        return "asked to leave" if before.text("how") == "left" else "started once more"
    return "the start before ended without a word"


def _last_step(events: Sequence[Event], folder: Path) -> int | None:
    for event in reversed(events):
        if event.event == "start" and (known := event.whole("last_step")) is not None:
            return known
    with suppress(UserError, OSError):  # a recipe may be damaged, or not know its length
        recipe = recipe_from_dict(read_sections(folder / RECIPE))
        return stages_of(recipe, lambda: None)[-1].last
    return None


def _recent(files: RunFiles) -> list[Line]:
    """Last lines since the last start, with the last one's batch."""
    first = next((e.step for e in reversed(files.events) if e.event == "start"), -1)
    lines = [line for line in files.metrics if line.step > first][-RECENT_LINES:]
    return [l for l in lines if l.number("global_batch") == lines[-1].number("global_batch")]


def _seconds_per_step(recent: Sequence[Line]) -> float | None:
    """By the times of lines, which saves and validations are between; else by their rates."""
    times = [(line.step, at) for line in recent if (at := line.seconds) is not None]
    if len(times) > 1:
        (first, began), (last, at) = times[0], times[-1]
        if last > first and at > began:
            return (at - began) / (last - first)
    return _median(_step_seconds(recent))


def _step_seconds(lines: Sequence[Line]) -> list[float]:
    """Of a step, by each line's rate."""
    pairs = ((line.number("global_batch"), line.number("samples_per_second")) for line in lines)
    seconds = [batch / rate for batch, rate in pairs if batch and rate]
    return [value for value in seconds if 0 < value < LONGEST_SECONDS]


def _interval(metrics: Sequence[Line]) -> float | None:
    """Usual seconds from line to line."""
    times = [at for line in metrics[-RECENT_LINES:] if (at := line.seconds) is not None]
    return _median([after - before for before, after in pairwise(times) if after > before])


def _written(files: RunFiles) -> float | None:
    """When the last line was."""
    if not files.metrics:
        return None
    return at if (at := files.metrics[-1].seconds) is not None else files.written


def _curves(metrics: Sequence[Line]) -> dict[str, list[float]]:
    names = (*metrics[-1].losses, "samples_per_second") if metrics else ()
    return {name: _thinned(_numbers(metrics, name)) for name in names}


def _thinned(values: Sequence[float]) -> list[float]:
    """At most `POINTS`, each the mean of as many neighbours."""
    size = max(1, -(-len(values) // POINTS))
    return [statistics.fmean(values[i : i + size]) for i in range(0, len(values), size)]


def _waiting(
    files: RunFiles, recent: Sequence[Line], per_step: float | None, lost: float
) -> Waiting:
    lag = _mean(_numbers(recent, "straggler_seconds"))
    return Waiting(
        data=_mean(_numbers(recent, "data_wait_fraction")),
        data_worst_rank=_mean(_numbers(recent, "data_wait_fraction_max")),
        others=_share(lag, per_step),
        saves=_share_of_saves(files.events, recent),
        restarts=_share_lost(files, lost),
    )


def _share_of_saves(events: Sequence[Event], recent: Sequence[Line]) -> float | None:
    times = [at for line in recent if (at := line.seconds) is not None]
    if not times:
        return None
    costs = [
        (event.number("blocked_seconds") or 0.0) * (event.number("saves") or 1.0)
        for event in events
        if event.event == "save" and times[0] < (event.seconds or 0.0) <= times[-1]
    ]
    return _share(sum(costs), times[-1] - times[0])


def _share_lost(files: RunFiles, lost: float) -> float | None:
    """Of the time from the first to the last line that is read."""
    lines = [*files.events[:1], *files.metrics[:1], *files.events[-1:], *files.metrics[-1:]]
    times = [at for line in lines if (at := line.seconds) is not None]
    return _share(lost, max(times) - min(times)) if times else None


def _share(part: float | None, whole: float | None) -> float | None:
    return min(1.0, max(0.0, part / whole)) if part is not None and whole else None


def _saves(events: Sequence[Event]) -> list[Save]:
    kinds: dict[str, list[Event]] = {}
    for event in events:
        if event.event == "save":
            kinds.setdefault(event.text("kind") or "shared", []).append(event)
    return [_last_save(kind, found) for kind, found in kinds.items()]


def _last_save(kind: str, saves: Sequence[Event]) -> Save:
    failed = [*takewhile(lambda event: event.text("failure") is not None, reversed(saves))]
    last = saves[-1 - len(failed)] if len(failed) < len(saves) else None
    return Save(
        kind=kind,
        step=None if last is None else last.step,
        time=None if last is None else last.text("time"),
        bytes=None if last is None else last.whole("bytes"),
        seconds=None if last is None else last.number("seconds"),
        blocked_seconds=None if last is None else last.number("blocked_seconds"),
        failures=len(failed),
        failure=failed[0].text("failure") if failed else None,
    )


def _rank(line: Line, which: str) -> str | None:
    rank, host = line.whole(f"{which}_rank"), line.text(f"{which}_host")
    return None if rank is None else f"rank {rank}{f' on {host}' if host else ''}"


def _scores(lines: Sequence[Line]) -> dict[str, float]:
    if not lines:
        return {}
    last = lines[-1]
    numbers = {name: last.number(name) for name in last.model_extra or {}}
    return {"step": last.step, **{n: value for n, value in numbers.items() if value is not None}}


def _numbers(lines: Sequence[Line], name: str) -> list[float]:
    return [number for line in lines if (number := line.number(name)) is not None]


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
