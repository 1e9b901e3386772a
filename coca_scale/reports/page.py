"""One self-contained HTML page about a run, or several next to each other."""

from __future__ import annotations

import base64
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from jinja2 import Environment, StrictUndefined
from pydantic import AfterValidator, BaseModel, Field, StrictFloat, StrictInt, create_model

from coca_scale.errors import UserError
from coca_scale.evaluation.kinds import flat_scores
from coca_scale.losses import LABELS
from coca_scale.recipe.files import read_json_as, readable_lines
from coca_scale.recipe.load import read_sections
from coca_scale.recipe.public import (
    public_cause,
    public_commit,
    public_name,
    public_recipe,
    public_versions,
)
from coca_scale.recipe.run_folder import (
    BAD_SAMPLES,
    METRICS,
    RECIPE,
    SHEETS,
    VALIDATION,
    VERSIONS,
)
from coca_scale.recipe.section import MAX_STEPS
from coca_scale.recipe.yaml_text import dump_yaml
from coca_scale.reports.curves import Curve, chart
from coca_scale.version import __version__

COLOURS = ("#3b6fb6", "#d1652f", "#3f8f5b", "#8c5aa8", "#b3923a", "#5b8f95", "#b0487a", "#6d6d6d")
_TEMPLATE = "report.html"
LARGEST = 1e300  # sums and percentages of smaller numbers are finite
# file key → title, how values are shown
_TRAINING = {
    "loss": "loss",
    **{f"{name}_loss": label for name, label in LABELS.items()},
    **{f"{name}_weight": f"weight of the {label}" for name, label in LABELS.items()},
    "samples_per_second": "samples per second",
    "peak_memory_bytes": "peak memory per rank (GiB)",
    "mfu": "model FLOPs utilization",
    "data_wait_fraction": "share of time waiting for data",
    "grad_norm": "gradient norm before clipping",
    "lr": "learning rate",
    "logit_scale": "logit scale (1 / temperature)",
    "logit_bias": "logit bias",
    "skipped_steps": "skipped steps",
}
_VALIDATION = {
    name: f"validation: {score.label}" for name, _, score in flat_scores() if score.charted
}


def _drawable(value: float) -> float | None:
    """A number that a chart can have; None for others."""
    return value if abs(value) < LARGEST else None


_Number = Annotated[StrictInt | StrictFloat, AfterValidator(_drawable)] | None


class _Line(BaseModel):
    step: Annotated[StrictInt, Field(ge=0, le=MAX_STEPS)]


class _BadSample(_Line):
    """A line of bad_samples.jsonl."""

    cause: str


def _numbers_of(*names: str) -> type[_Line]:
    """A line about a step with these numbers, of which any may be missing."""
    fields: dict[str, Any] = dict.fromkeys(names, (_Number, None))
    return create_model("_Numbers", __base__=_Line, **fields)


# what lines of a run's files say, as far as it is shown
_LINES: dict[str, type[_Line]] = {
    METRICS: _numbers_of(*_TRAINING, "samples_seen", "global_batch", "bad_samples"),
    VALIDATION: _numbers_of("samples", *(name for name, _, _ in flat_scores())),
    BAD_SAMPLES: _BadSample,
}


@dataclass(frozen=True)
class RunRecord:
    """What a run has written, as others may see it, but for `unredacted`.

    Attributes:
        name: of its folder.
        folder: the folder.
        metrics: lines of metrics.jsonl.
        validation: lines of validation.jsonl.
        sections: the resolved recipe.
        recipe: the same, flattened to dotted keys.
        unredacted: values of the recipe as they are, with the keys of `recipe` that they have
            there; for comparing runs, and never to be shown.
        versions: of packages.
        commit: of coca-scale.
        ranks: of the job.
        bad: bad samples by cause.
        damaged: lines of its files that cannot be read.
    """

    name: str
    folder: Path
    metrics: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    sections: dict[str, Any]
    recipe: dict[str, Any]
    unredacted: dict[str, tuple[Any, str]]
    versions: dict[str, str]
    commit: str
    ranks: int | None
    bad: Counter[str]
    damaged: int


class _About(BaseModel):
    """What versions.json says."""

    versions: dict[str, str] = {}
    git_commit: str | None = None
    ranks: int | None = None


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        UserError: it is none, or nothing has been logged yet.
    """
    recipe = folder / RECIPE
    if not recipe.is_file():
        raise UserError(f"{folder} is no run: it has no recipe.yaml")
    sections = read_sections(recipe)
    paths = {folder / name: kind for name, kind in _LINES.items()}
    found = [[*readable_lines(p, kind)] if p.is_file() else [] for p, kind in paths.items()]
    metrics, validation, bad = (
        [line.model_dump(exclude_none=True) for line in lines if line is not None]
        for lines in found
    )
    if not metrics:
        raise UserError(f"{folder} has logged nothing yet: metrics.jsonl is empty or not there")
    versions = folder / VERSIONS
    about = _about(versions) if versions.is_file() else {}
    shown = public_recipe(sections)
    pairs = zip(_flat(sections), _flat(shown), strict=True)
    return RunRecord(
        name=public_name(folder.resolve().name),
        folder=folder,
        metrics=metrics,
        validation=validation,
        sections=shown,
        recipe=dict(_flat(shown)),
        unredacted={key: (value, shown_key) for (key, value), (shown_key, _) in pairs},
        versions=public_versions(about),
        commit=public_commit(about),
        ranks=about.get("ranks"),
        bad=Counter(public_cause(line["cause"]) for line in bad),
        damaged=sum(lines.count(None) for lines in found),
    )


def report(folders: Sequence[Path]) -> str:
    """The page, which needs nothing from outside itself.

    Raises:
        UserError: a folder is no run, or more runs than colours.
    """
    if len(folders) > len(COLOURS):
        raise UserError(f"a page shows at most {len(COLOURS)} runs, not {len(folders)}")
    runs = [read_run(folder) for folder in folders]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = files("coca_scale.reports").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=" and ".join(run.name for run in runs),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        version=__version__,
        runs=[
            {"name": run.name, "colour": colour, "facts": _facts(run), "sheet": _sheet(run)}
            for run, colour in zip(runs, COLOURS, strict=False)
        ],
        charts=list(_charts(runs)),
        differences=_differences(runs),
        recipes=[{"name": run.name, "text": dump_yaml(run.sections)} for run in runs],
        bad=[{"name": run.name, "causes": run.bad.most_common()} for run in runs if run.bad],
    )


def last_sheet(run: RunRecord) -> Path | None:
    """Its newest sheet of captioned validation pictures."""
    sheets = (run.folder / SHEETS).glob(f"step_{'[0-9]' * 8}.png")
    return max(sheets, default=None)


def _facts(run: RunRecord) -> dict[str, str]:
    """What a run is and how it went, in a few words each."""
    last, recipe = run.metrics[-1], run.recipe
    tail = run.metrics[len(run.metrics) // 10 :]
    rates = [rate for line in tail if (rate := line.get("samples_per_second")) is not None]
    peak = max(line.get("peak_memory_bytes") or 0 for line in run.metrics)
    facts = {
        "model": str(recipe.get("model.name", "")),
        "ranks": "" if run.ranks is None else str(run.ranks),
        "global batch": _count(last.get("global_batch")),
        "precision": f"{recipe.get('engine.precision')}, ZeRO {recipe.get('engine.zero_stage')}",
        "steps": f"{last['step']:,}",
        "samples seen": _count(last.get("samples_seen")),
        "last loss": _number(last.get("loss")),
        "samples per second": _number(statistics.median(rates) if rates else None),
        "peak memory": f"{peak / 2**30:.2f} GiB per rank",
        "skipped steps": _count(last.get("skipped_steps")),
        "bad samples": _count(last.get("bad_samples")),
    }
    if run.damaged:
        facts["damaged lines"] = f"{_count(run.damaged)}, left out"
    if run.validation:
        final = run.validation[-1]
        facts["validation pairs"] = _count(final.get("samples"))
        for name, _, score in flat_scores():
            if score.headline and final.get(name) is not None:
                unit = " %" if score.percent else ""
                facts[score.label] = f"{score.shown(final[name]):.1f}{unit}"
    facts["versions"] = ", ".join(f"{name} {number}" for name, number in run.versions.items())
    facts["commit"] = run.commit
    return facts


def _charts(runs: Sequence[RunRecord]) -> Iterator[dict[str, str]]:
    """Titles and SVG of what at least one run has values of."""
    for titles, of_run in (
        (_TRAINING, lambda run: run.metrics),
        (_VALIDATION, lambda run: run.validation),
    ):
        for key, title in titles.items():
            curves = [
                Curve(run.name, colour, _points(of_run(run), key))
                for run, colour in zip(runs, COLOURS, strict=False)
            ]
            # a count that stayed 0 needs no chart
            if any(y for curve in curves for _, y in curve.points):
                yield {"title": title, "svg": chart(curves, f"{title} by step")}


def _points(lines: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    scale = 2**-30 if key.endswith("_bytes") else 1
    found = ((line["step"], line.get(key)) for line in lines)
    return [(step, value * scale) for step, value in found if value is not None]


def _sheet(run: RunRecord) -> dict[str, str] | None:
    """The last sheet of captioned pictures as a data URL."""
    sheet = last_sheet(run)
    if sheet is None:
        return None
    content = base64.b64encode(sheet.read_bytes()).decode()
    step = int(sheet.stem.removeprefix("step_"))
    return {"step": f"{step:,}", "url": f"data:image/png;base64,{content}"}


def _differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Recipe keys whose values are not the same in all runs, but for names and folders."""
    keys = {key: shown for run in runs for key, (_, shown) in run.unredacted.items()}
    rows = []
    for key in sorted(keys.keys() - {"run.name", "run.dir"}):
        values = [json.dumps(run.unredacted.get(key, (None,))[0]) for run in runs]
        if len(set(values)) > 1:
            shown = [json.dumps(run.recipe.get(keys[key])) for run in runs]
            rows.append((keys[key], shown))
    return rows


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _about(versions: Path) -> dict[str, Any]:
    return read_json_as(versions, _About).model_dump(exclude_unset=True)


def _count(value: float | None) -> str:
    return "none" if value is None else f"{value:,}"


def _number(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return "none"
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{min(digits, 6)}f}"
