"""`coca-scale eval`: zeroshot, retrieval, captioning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coca_scale.cli.arguments import (
    METHODS,
    BatchSize,
    CaptionColumn,
    ConfigOption,
    DataArgument,
    ImageColumn,
    ImagesOption,
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
    SplitOption,
    progress_bar,
    skipped,
)
from coca_scale.cli.inputs import data_section, load, open_inputs

if TYPE_CHECKING:
    from coca_scale.evaluation.tasks import Result

app = typer.Typer(help="Measure what a model can do.", no_args_is_help=True)


@app.command("zeroshot")
def eval_zeroshot(
    model: ModelArgument,
    data: Annotated[str, typer.Argument(help="Folder of class folders, or shards with .cls.")],
    classnames: Annotated[
        str | None, typer.Option(help="imagenet, or a file; default: names of the folders.")
    ] = None,
    templates: Annotated[
        str, typer.Option(help="openai (80 sentences), simple (7), or a file of lines with {}.")
    ] = "openai",
    out: OutJson = None,
    limit: Limit = None,
    batch_size: BatchSize = 64,
    precision: PrecisionOption = Precision.FP32,
    config: ConfigOption = None,
    raw_weights: RawWeights = False,
) -> None:
    """Zero-shot classification: accuracy among the best and the best five classes.

    Example: coca-scale eval zeroshot runs/large imagenet/val --out zeroshot.json
    """
    from coca_scale.evaluation.tasks import Evaluation
    from coca_scale.evaluation.zeroshot import open_labelled

    labelled = open_labelled(data, data_section([data]), classnames, templates)
    loaded = load(model, config, raw_weights, precision)
    with progress_bar("pictures") as progress:
        task = Evaluation(loaded, batch_size, limit, progress)
        result = task.zeroshot(labelled)
    _report(result, model, [data], out)


@app.command("retrieval")
def eval_retrieval(
    model: ModelArgument,
    data: DataArgument,
    equal_captions: Annotated[
        bool, typer.Option("--equal-captions", help="Any picture with the same caption is right.")
    ] = False,
    out: OutJson = None,
    limit: Limit = None,
    batch_size: BatchSize = 64,
    precision: PrecisionOption = Precision.FP32,
    image_column: ImageColumn = "filepath",
    caption_column: CaptionColumn = "title",
    images: ImagesOption = None,
    split: SplitOption = None,
    config: ConfigOption = None,
    raw_weights: RawWeights = False,
) -> None:
    """Recall at 1, 5 and 10, image to text and text to image.

    Example: coca-scale eval retrieval runs/large dataset_coco.json --images coco/ --split test
    """
    from coca_scale.evaluation.tasks import Evaluation

    parts = open_inputs(data, image_column, caption_column, images, split, captions_needed=True)
    loaded = load(model, config, raw_weights, precision)
    with progress_bar("pictures") as progress:
        task = Evaluation(loaded, batch_size, limit, progress)
        result = task.retrieval(parts, equal_captions)
    _report(result, model, data, out)


@app.command("captioning")
def eval_captioning(
    model: ModelArgument,
    data: DataArgument,
    method: MethodOption = Method.BEAM,
    num_beams: NumBeams = 6,
    max_length: MaxLength = None,
    min_length: MinLength = 5,
    out: OutJson = None,
    limit: Limit = None,
    batch_size: BatchSize = 64,
    precision: PrecisionOption = Precision.FP32,
    image_column: ImageColumn = "filepath",
    caption_column: CaptionColumn = "title",
    images: ImagesOption = None,
    split: SplitOption = None,
    config: ConfigOption = None,
    raw_weights: RawWeights = False,
) -> None:
    """BLEU, METEOR, ROUGE-L, CIDEr and SPICE of generated captions, by COCO's own code.

    Example: coca-scale eval captioning runs/large dataset_coco.json --images coco/ --split test
    """
    from coca_scale.evaluation.captioning import Captioner
    from coca_scale.evaluation.tasks import Evaluation
    from coca_scale.inference.generation_options import GenerationOptions

    options = GenerationOptions(METHODS[method], max_length, min_length, num_beams)
    parts = open_inputs(data, image_column, caption_column, images, split, captions_needed=True)
    loaded = load(model, config, raw_weights, precision)
    with progress_bar("pictures") as progress:
        task = Evaluation(loaded, batch_size, limit, progress)
        result = task.captioning(parts, Captioner(loaded, options, batch_size=batch_size))
    _report(result, model, data, out)


def _report(result: Result, model: str, data: list[str], out: Path | None) -> None:
    """Scores on screen and in a file."""
    from rich.console import Console

    result.show(Console())
    if result.bad:
        typer.echo(skipped(result.bad).removeprefix("; "))
    if out is not None:
        content = {"model": model, "data": data, **result.json()}
        out.write_text(json.dumps(content, indent=1) + "\n")
        typer.echo(f"scores: {out}")
