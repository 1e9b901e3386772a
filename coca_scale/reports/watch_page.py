"""A page about a run, or a row for each of several, in a terminal of 80 columns or more."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.live import Live
from rich.text import Text

from coca_scale.recipe.text import visible
from coca_scale.reports.run_files import Pulse, seconds_of
from coca_scale.reports.watch_state import RunState, Save, Start, read_state

WIDEST = 120
_BARS = ("▁▂▃▄▅▆▇█", "█", "░")
_ASCII_BARS = ("_.-=+*%#", "#", ".")
_IN_ASCII = str.maketrans({"…": "...", "×": "x", "→": "->", "–": "-"})
_COLOURS = {
    "running": "green",
    "finished": "green",
    "starting": "cyan",
    "stalled": "yellow",
    "failed": "red",
    "lost": "red",
}
_LINE_ENDS = re.compile(r"[\t\n\u2028\u2029]+")
_LABEL = 12
_ROW = (16, 8, 13, 4, 9, 7, 8)  # run, state, step, done, samples/s, loss, left


@dataclass(frozen=True)
class Screen:
    """What a page is drawn for.

    Attributes:
        width: columns.
        unicode: whether it shows more than ASCII.
        now: seconds since 1970, for ages.
    """

    width: int
    unicode: bool
    now: float

    def line(self, text: str, style: str = "") -> Text:
        """A line that steers no terminal, and is no longer than the screen is wide."""
        text = _in_line(text)
        if not self.unicode:
            text = text.translate(_IN_ASCII).encode("ascii", "backslashreplace").decode()
        if cell_len(text) > self.width:
            text = set_cell_size(text, self.width - 3).rstrip() + "..."
        return Text(text, style=style, no_wrap=True, overflow="crop", end="")

    def spark(self, values: Sequence[float], width: int) -> str:
        """The last values as small bars, from the least to the largest."""
        glyphs = (_BARS if self.unicode else _ASCII_BARS)[0]
        values = values[-width:]
        if len(values) < 2:
            return ""
        least, span = min(values), max(values) - min(values)
        top = len(glyphs) - 1
        return "".join(glyphs[round((v - least) / span * top) if span > 0 else 0] for v in values)

    def bar(self, share: float, width: int) -> str:
        """How much of something is done."""
        _, full, empty = _BARS if self.unicode else _ASCII_BARS
        done = round(max(0.0, min(1.0, share)) * width)
        return full * done + empty * (width - done)

    def ago(self, at: str | None) -> str:
        """How long it is since a time of a run's files."""
        seconds = seconds_of(at)
        return "" if seconds is None else f"{duration(max(0.0, self.now - seconds))} ago"


def watch(folders: Sequence[Path], every_seconds: float, once: bool) -> None:
    """Draw runs in this terminal until Ctrl-C; where there is none, or with `once`, print them.

    Raises:
        UserError: a folder is no run.
    """
    console = Console(highlight=False, markup=False, emoji=False)
    looks = [Look(folder) for folder in folders]
    page = _page(looks, console)
    if once or not console.is_terminal or console.is_dumb_terminal:
        _print(page, console)
        return
    live = Live(page, console=console, screen=True, auto_refresh=False)
    with suppress(KeyboardInterrupt), live:
        live.refresh()
        while True:
            time.sleep(every_seconds)
            with suppress(OSError):  # a file server that is away for a while: the last page
                page = _page(looks, console)
            live.update(page, refresh=True)
    _print(page, console)  # what was last seen stays in the terminal


class Look:
    """A run folder that is looked at again and again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pulse = Pulse(folder)

    def state(self) -> RunState:
        """Of now.

        Raises:
            UserError: it is no run folder.
        """
        return read_state(self._folder, self._pulse, time.time(), time.monotonic())


def _page(looks: Sequence[Look], console: Console) -> Text:
    states = [look.state() for look in looks]
    screen = Screen(min(console.width, WIDEST), speaks_unicode(console), time.time())
    lines = page_of_one(states[0], screen) if len(states) == 1 else page_of_many(states, screen)
    return Text("\n").join(lines)


def _print(page: Text, console: Console) -> None:
    console.print(page, no_wrap=True, crop=False, soft_wrap=True)


def speaks_unicode(console: Console, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the terminal shows more than ASCII, as its locale says.

    Python writes UTF-8 where the locale is C, and says so in LC_CTYPE; the terminal knows nothing
    of that.
    """
    names = [environ.get(name, "") for name in ("LC_ALL", "LC_CTYPE", "LANG")]
    if names[1] == "C.UTF-8":
        names.pop(1)
    chosen = next((name for name in names if name), "C").upper().replace("-", "")
    return "UTF8" in chosen and console.encoding.lower().startswith("utf")


def page_of_one(run: RunState, screen: Screen) -> list[Text]:
    """All about a run: lines of at most the screen's width."""
    head = f"{run.run}  {run.state}{f': {run.about}' if run.about else ''}"
    since = screen.ago(run.since)
    lines = [
        screen.line(f"{head}{f', {since}' if since else ''}", _style(run)),
        screen.line(_progress(run, screen)),
        screen.line(""),
    ]
    rows = [
        *(("rate", text) for text in _rate(run, screen)),
        *_losses(run, screen),
        *(("validation", text) for text in _validation(run, screen)),
        *(("waiting", text) for text in _waiting(run)),
        *(("slowest", text) for text in _slowest(run)),
        ("bad", _bad(run)),
        *(("save", text) for text in _saves(run, screen)),
        *(("starts", text) for text in _starts(run, screen)),
    ]
    if run.damaged_lines:
        rows.append(("files", f"{run.damaged_lines} damaged lines left out"))
    before = ""
    for label, text in rows:
        shown = "" if label == before else label
        lines.append(screen.line(f"{shown:<{_LABEL}}{text}"))
        before = label
    return lines


def page_of_many(runs: Sequence[RunState], screen: Screen) -> list[Text]:
    """A row for each run, and a line below for what is wrong with one."""
    titles = ("run", "state", "step", "done", "samples/s", "loss", "left")
    lines = [screen.line(_row(titles), "bold")]
    for run in runs:
        loss = run.losses.get("loss")
        done = "" if not run.last_step else f"{run.step / run.last_step:.0%}"
        cells = (
            run.run,
            run.state,
            f"{run.step:,}" + ("" if run.last_step is None else f"/{_short(run.last_step)}"),
            done,
            "" if run.samples_per_second is None else _short(run.samples_per_second),
            "" if loss is None else number(loss),
            "" if run.seconds_left is None else duration(run.seconds_left),
        )
        row = _row(cells)
        room = screen.width - cell_len(row) - 1
        curve = screen.spark(run.curves.get("loss", []), room) if room >= 8 else ""
        lines.append(screen.line(f"{row} {curve}", _style(run)))
        if run.about and run.state not in ("finished", "starting"):
            since = screen.ago(run.since)
            lines.append(screen.line(f"  {run.about}{f', {since}' if since else ''}"))
    return lines


def _row(cells: Iterable[str]) -> str:
    fitted = []
    for number_of, (cell, width) in enumerate(zip(cells, _ROW, strict=True)):
        cell = _in_line(cell)
        if number_of > 1:
            fitted.append(" " * max(0, width - cell_len(cell)) + cell)
        else:
            fitted.append(set_cell_size(cell, width))
    return " ".join(fitted).rstrip()


def _style(run: RunState) -> str:
    return _COLOURS.get(run.state, "")


def _progress(run: RunState, screen: Screen) -> str:
    step = f"step {run.step:,}"
    if run.stage is not None:
        step = f"stage {run.stage}, {step}"
    if not run.last_step:
        return step
    share = run.step / run.last_step
    text = f"{step} of {run.last_step:,}  BAR {share:.1%}"
    if run.seconds_left is not None and share < 1:
        text += f", {duration(run.seconds_left)} left"
    return text.replace("BAR", screen.bar(share, max(4, min(40, screen.width - len(text)))))


def _rate(run: RunState, screen: Screen) -> Iterator[str]:
    if run.samples_per_second is None:
        return
    parts = [f"{run.samples_per_second:,.0f} samples/s"]
    if run.seconds_per_step is not None:
        parts.append(f"{number(run.seconds_per_step)} s a step")
    if run.mfu is not None:
        parts.append(f"MFU {run.mfu:.1%}")
    if run.peak_memory_bytes is not None:
        parts.append(f"peak {run.peak_memory_bytes / 2**30:.1f} GiB")
    yield _beside(", ".join(parts), run.curves.get("samples_per_second", []), screen)


def _losses(run: RunState, screen: Screen) -> Iterator[tuple[str, str]]:
    for name, value in run.losses.items():
        shown = "not finite" if value is None else number(value)
        curve = screen.spark(run.curves.get(name, []), screen.width - _LABEL - 11)
        yield name.removesuffix("_loss"), f"{shown:<10} {curve}"


def _beside(text: str, values: Sequence[float], screen: Screen) -> str:
    room = screen.width - _LABEL - len(text) - 2
    return f"{text}  {screen.spark(values, room)}" if room >= 8 else text


def _validation(run: RunState, screen: Screen) -> Iterator[str]:
    """All scores, on as many lines as that takes."""
    line = ""
    for name, value in run.validation.items():
        score = f"{name} {number(value)}"
        if line and len(line) + len(score) + 2 > screen.width - _LABEL:
            yield line
            line = ""
        line += f"{', ' if line else ''}{score}"
    if line:
        yield line


def _waiting(run: RunState) -> Iterator[str]:
    waiting, parts = run.waiting, []
    if waiting.data is not None:
        worst = waiting.data_worst_rank
        at_worst = "" if worst is None else f" (worst rank {worst:.1%})"
        parts.append(f"data {waiting.data:.1%}{at_worst}")
    for name, share in (("other ranks", waiting.others), ("saves", waiting.saves)):
        if share is not None:
            parts.append(f"{name} {share:.1%}")
    if waiting.restarts:
        parts.append(f"restarts {waiting.restarts:.1%} of all")
    if parts:
        yield ", ".join(parts)


def _slowest(run: RunState) -> Iterator[str]:
    if run.slowest_rank is not None:
        yield f"{run.slowest_rank} arrives last"
    if run.slow_device is not None and run.slow_device_times is not None:
        times = f"{run.slow_device_times:.2f}×"
        yield f"{run.slow_device} computes longest, {times} the median"


def _bad(run: RunState) -> str:
    last = "" if run.last_skipped_step is None else f" (last {run.last_skipped_step:,})"
    return (
        f"{run.bad_samples or 0:,} samples, {run.skipped_steps or 0:,} skipped steps{last}, "
        f"{run.loss_spikes or 0:,} loss spikes"
    )


def _saves(run: RunState, screen: Screen) -> Iterator[str]:
    for save in run.saves:
        kind = "" if save.kind == "shared" else f"{save.kind}: "
        if save.step is not None:
            yield f"{kind}step {save.step:,}, {screen.ago(save.time)}{_cost(save)}"
        if save.failures:
            times = "" if save.failures == 1 else f"{save.failures} times, "
            yield f"{kind}failed since: {times}{save.failure}"
    if not run.saves:
        yield run.checkpoint or "none yet"


def _cost(save: Save) -> str:
    parts = []
    if save.bytes is not None and save.seconds is not None:
        parts.append(f"{save.bytes / 1e9:.2f} GB in {save.seconds:.1f} s")
    if save.blocked_seconds is not None:
        parts.append(f"training waited {save.blocked_seconds:.1f} s")
    return f": {', '.join(parts)}" if parts else ""


def _starts(run: RunState, screen: Screen) -> Iterator[str]:
    again = [start for start in run.starts if start.why is not None]
    if not run.starts:
        return
    last = run.starts[-1]
    job = _job(last)
    if not again:
        yield f"one, {screen.ago(last.time)}{job}"
        return
    yield (
        f"{len(again) + 1}; lost {duration(run.lost_seconds)}, {run.repeated_steps:,} steps "
        "run again"
    )
    start = again[-1]
    yield f"last {screen.ago(start.time)} at step {start.step:,}{_job(start)}: {start.why}"


def _job(start: Start) -> str:
    if start.job is None:
        return ""
    launch = f".{start.launch}" if start.launch else ""
    number_of = f" start {start.restart or 0}{launch}" if start.restart or launch else ""
    return f", job {start.job}{number_of}"


def _in_line(text: str) -> str:
    return visible(_LINE_ENDS.sub(" ", text))


def duration(seconds: float) -> str:
    """A time as people say it: 42 s, 7 min, 5 h 12, 3.4 d."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{int(seconds) // 3600} h {int(seconds) // 60 % 60:02d}"
    return f"{seconds / 86400:,.1f} d"


def number(value: float) -> str:
    """Four digits that count, or fewer."""
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    if value == int(value):
        return f"{value:,.0f}"
    digits = max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 4)}f}"


def _short(value: float) -> str:
    """In at most six characters."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(value) >= size:
            scale = 1e3 if unit == "k" else size
            return f"{value / scale:.0f}{unit}" if abs(value) < 1e12 else f"{value:.0e}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.1f}"
