"""Arguments and options that several verbs share, and what verbs say."""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coca_scale.recipe.text import visible

if TYPE_CHECKING:
    from coca_scale.inference.generation_options import GenerationType


class Method(str, Enum):
    """Ways of searching captions."""

    BEAM = "beam"
    GREEDY = "greedy"
    TOP_K = "top-k"
    TOP_P = "top-p"


class Precision(str, Enum):
    """What a model computes in."""

    FP32 = "fp32"
    BF16 = "bf16"


METHODS: dict[Method, GenerationType] = {
    Method.BEAM: "beam_search",
    Method.GREEDY: "greedy",
    Method.TOP_K: "top_k",
    Method.TOP_P: "top_p",
}
MethodOption = Annotated[Method, typer.Option(help="How captions are searched.")]
NumBeams = Annotated[int, typer.Option(help="Of beam search.")]
MaxLength = Annotated[
    int | None, typer.Option(help="Most tokens, start and end included; default 30.")
]
MinLength = Annotated[int, typer.Option(help="Least tokens before the end.")]
DataArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="DATA...",
        help="Pictures with captions: folders with .txt side-cars, .csv/.tsv, COCO's or Karpathy's "
        ".json, shards.",
    ),
]
OutJson = Annotated[Path | None, typer.Option(help="JSON file to write.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use at most that many pictures.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures at a time.")]
PrecisionOption = Annotated[Precision, typer.Option(help="What the model computes in.")]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Run, checkpoint or exported folder, weight file with --config, hf-hub:ORG/NAME, "
        "or NAME@TAG of OpenCLIP's registry.",
    ),
]
ConfigOption = Annotated[
    str | None, typer.Option(help="Of a weight file: name or JSON file of its model config.")
]
RawWeights = Annotated[
    bool, typer.Option("--raw-weights", help="The last weights of a run, not their average.")
]
CORES = len(os.sched_getaffinity(0))
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]
RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE...]", help="Change the recipe.")
]


@contextmanager
def progress_bar(what: str, active: bool = True) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (what, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (active and console.is_terminal)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def give_parameters(
    command: Callable[..., Any], verb: Callable[..., Any], parameters: Iterable[inspect.Parameter]
) -> None:
    """Let `command`, which stands for `verb`, be called with these; required ones come first."""
    ordered = sorted(parameters, key=lambda p: p.default is not p.empty)
    command.__name__, command.__doc__ = verb.__name__, verb.__doc__
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    command.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]


def say(text: str, err: bool = False, nl: bool = True) -> None:
    """What a verb tells: names of files and words of data in it steer no terminal."""
    typer.echo(visible(text), err=err, nl=nl)


def skipped(bad: Counter[str]) -> str:
    """The end of a line about what was used."""
    if not bad:
        return ""
    from coca_scale.data.sample import causes_text

    return f"; skipped {sum(bad.values())} ({causes_text(bad)})"
