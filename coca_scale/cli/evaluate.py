"""`coca-scale eval`: a verb for every kind of evaluation.

A verb names its own arguments and returns an evaluator; what all verbs share (the model, how it is
fed, where scores go) is added by `_verb`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coca_scale.cli.arguments import (
    METHODS,
    BatchSize,
    ConfigOption,
    DataArgument,
    Limit,
    MaxLength,
    Method,
    MethodOption,
    MinLength,
    ModelArgument,
    NumBeams,
    OutJson,
    Precision,
    PrecisionOption,
    RawWeights,
    give_parameters,
    progress_bar,
    say,
    skipped,
)
from coca_scale.cli.inputs import data_section, load, open_inputs, ranks
from coca_scale.cli.listing import ListArguments, lists_data
from coca_scale.recipe.whole_files import write_whole

if TYPE_CHECKING:
    from coca_scale.evaluation.pictures import InputPictures
    from coca_scale.evaluation.results import Evaluator, Result
else:
    Evaluator = Any  # read at run time with the verbs' other annotations; its module is slow

app = typer.Typer(help="Measure what a model can do.", no_args_is_help=True)


def _shared(
    model: ModelArgument,
    data: DataArgument,
    out: OutJson = None,
    limit: Limit = None,
    batch_size: BatchSize = 64,
    precision: PrecisionOption = Precision.FP32,
    config: ConfigOption = None,
    raw_weights: RawWeights = False,
) -> None:
    """Arguments of every verb."""


def _verb(name: str) -> Callable[[Callable[..., Evaluator]], Callable[..., Evaluator]]:
    """Register what makes an evaluator from `data` and its own arguments as `eval NAME`."""

    def register(make: Callable[..., Evaluator]) -> Callable[..., Evaluator]:
        shared = inspect.signature(_shared, eval_str=True).parameters
        own = inspect.signature(make, eval_str=True).parameters
        merged = {**shared, **own}  # a verb may say more of `data`

        def command(**arguments: Any) -> None:
            given = {key: arguments[key] for key in own}
            common = {key: arguments[key] for key in shared}
            _run(lambda: make(**given), **common)

        give_parameters(command, make, merged.values())
        app.command(name)(command)
        return make

    return register


def _run(
    make: Callable[[], Evaluator],
    model: str,
    data: list[str],
    out: Path | None,
    limit: int | None,
    batch_size: int,
    precision: Precision,
    config: str | None,
    raw_weights: bool,
) -> None:
    """Evaluate, on as many ranks as a launcher has started."""
    from coca_scale.evaluation.encoder import Feeding, loaded_encoder

    with ranks() as world:
        evaluator = world.agree(make)
        loaded = load(model, config, raw_weights, precision, world)
        with progress_bar("pictures", world.rank == 0) as progress:
            feeding = Feeding(batch_size, limit, progress)
            result = evaluator.run(loaded_encoder(loaded, world), feeding)
        if world.rank == 0:
            _report(result, model, data, out)


def _report(result: Result, model: str, data: list[str], out: Path | None) -> None:
    """Scores on screen and in a file."""
    from rich.console import Console

    result.show(Console())
    if result.bad:
        say(skipped(result.bad).removeprefix("; "))
    if out is not None:
        content = {"model": model, "data": data, **result.json()}
        write_whole(out, json.dumps(content, indent=1) + "\n")
        say(f"scores: {out}")


def _captioned(data: list[str], listing: ListArguments) -> InputPictures:
    from coca_scale.evaluation.pictures import InputPictures

    return InputPictures(open_inputs(data, listing, captions_needed=True))


@_verb("zeroshot")
def eval_zeroshot(
    data: Annotated[
        list[str],
        typer.Argument(metavar="DATA", help="Folder of class folders, or shards with .cls."),
    ],
    classnames: Annotated[
        str | None,
        typer.Option(help="imagenet, or a file; default: the folders' names or WordNet ids."),
    ] = None,
    templates: Annotated[
        str, typer.Option(help="openai (80 sentences), simple (7), or a file of lines with {}.")
    ] = "openai",
) -> Evaluator:
    """Zero-shot classification: accuracy among the best and the best five classes.

    Example: coca-scale eval zeroshot runs/large imagenet/val --out zeroshot.json
    """
    from coca_scale.evaluation.zeroshot import ZeroShot, open_labelled

    return ZeroShot(open_labelled(data, data_section(data), classnames, templates))


@_verb("retrieval")
@lists_data
def eval_retrieval(
    data: DataArgument,
    *,
    equal_captions: Annotated[
        bool, typer.Option("--equal-captions", help="Any picture with the same caption is right.")
    ] = False,
    listing: ListArguments,
) -> Evaluator:
    """Recall at 1, 5 and 10, image to text and text to image.

    Example: coca-scale eval retrieval runs/large dataset_coco.json --images coco/ --split test
    """
    from coca_scale.evaluation.retrieval import Retrieval

    return Retrieval(_captioned(data, listing), equal_captions)


@_verb("captioning")
@lists_data
def eval_captioning(
    data: DataArgument,
    *,
    method: MethodOption = Method.BEAM,
    num_beams: NumBeams = 6,
    max_length: MaxLength = None,
    min_length: MinLength = 5,
    listing: ListArguments,
) -> Evaluator:
    """BLEU, METEOR, ROUGE-L, CIDEr and SPICE of generated captions, by COCO's own code.

    Example: coca-scale eval captioning runs/large dataset_coco.json --images coco/ --split test
    """
    from coca_scale.evaluation.captioning_scores import Captioning
    from coca_scale.inference.generation_options import GenerationOptions

    options = GenerationOptions(METHODS[method], max_length, min_length, num_beams)
    return Captioning(_captioned(data, listing), options)
