"""`coca-scale data`: prepare and inspect training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from coca_scale.cli.arguments import (
    CORES,
    BatchSize,
    ConfigOption,
    ModelArgument,
    Precision,
    PrecisionOption,
    RawWeights,
    Workers,
    progress_bar,
    say,
    skipped,
)
from coca_scale.cli.inputs import load, open_shards, ranks
from coca_scale.cli.listing import ListArguments, lists_data
from coca_scale.errors import UserError
from coca_scale.recipe.whole_files import write_whole

app = typer.Typer(help="Prepare and inspect training data.", no_args_is_help=True)


@app.command("pack")
@lists_data
def data_pack(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Folder with .txt side-cars, .csv/.tsv, COCO's or Karpathy's .json.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    listing: ListArguments,
    shard_samples: Annotated[int, typer.Option(min=1, help="Samples per shard.")] = 10000,
    max_side: Annotated[
        int | None, typer.Option(min=16, help="Scale larger pictures down, in pixels.")
    ] = None,
    hold_out: Annotated[
        int | None,
        typer.Option(min=2, help="Every N-th picture goes to OUT/val, others OUT/train."),
    ] = None,
    workers: Workers = CORES,
) -> None:
    """Write WebDataset shards and manifest.json; goes on where an interrupted call stopped.

    Example: coca-scale data pack photos/ --out shards/ --hold-out 10
    """
    from coca_scale.data.pack import PackOptions, pack, pack_split

    options = PackOptions(**listing, shard_samples=shard_samples, max_side=max_side)
    with progress_bar("pictures") as progress:
        if hold_out is None:
            results = {out: pack(source, out, options, workers, progress)}
        else:
            parts = pack_split(source, out, options, hold_out, workers, progress)
            results = {out / name: result for name, result in parts.items()}
    for folder, done in results.items():
        say(f"{done.samples} samples in {done.shards} shards in {folder}{skipped(done.bad)}")


@app.command("inspect")
def data_inspect(
    shards: Annotated[
        list[str], typer.Argument(metavar="SHARDS...", help="Folders, paths, braces, urls, pipe:.")
    ],
    decode: Annotated[
        bool, typer.Option(help="Decode every picture, which is what finds broken ones.")
    ] = True,
    picture: Annotated[Path | None, typer.Option(help="PNG with the caption lengths.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON with all counts.")] = None,
    write_manifest: Annotated[
        bool, typer.Option("--write-manifest", help="Write manifest.json beside the shards.")
    ] = False,
    captions: Annotated[
        list[str] | None,
        typer.Option(help="Where captions are, as in data.captions: txt, a field, NAME:sentences."),
    ] = None,
    workers: Workers = CORES,
) -> None:
    """Count what shards hold: samples, sizes, caption lengths, faults by cause.

    Example: coca-scale data inspect "shards/{000000..000009}.tar" --picture lengths.png
    """
    from coca_scale.data import inspection

    with progress_bar("shards") as progress:
        found = inspection.inspect_shards(shards, decode, workers, progress, captions or ())
    say(found.text())
    if picture is not None:
        found.draw(picture)
        say(f"picture: {picture}")
    if out is not None:
        write_whole(out, json.dumps(found.facts(), indent=1) + "\n")
    if write_manifest:
        say(f"wrote {inspection.write_manifest(found)}")
    if not found.lengths:
        raise UserError(f"{', '.join(shards)}: no usable sample")


@app.command("embed")
def data_embed(
    model: ModelArgument,
    shards: Annotated[
        list[str], typer.Argument(metavar="SHARDS...", help="Folders, paths, braces, urls, pipe:.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for a file per shard.")],
    captions: Annotated[
        list[str] | None,
        typer.Option(help="A name of data.captions, once for each; default: those of data pack."),
    ] = None,
    batch_size: BatchSize = 64,
    precision: PrecisionOption = Precision.FP32,
    config: ConfigOption = None,
    raw_weights: RawWeights = False,
) -> None:
    """Store a model's features of shards, to learn from; goes on where an interrupted call stopped.

    Example: coca-scale data embed runs/large shards/ --out features/ --precision bf16

    On 8 GPUs: torchrun --nproc-per-node 8 -m coca_scale data embed MODEL SHARDS --out DIR
    """
    from coca_scale.data.stored_features import TeacherFacts
    from coca_scale.evaluation.embed_job import EmbedJob
    from coca_scale.evaluation.encoder import loaded_encoder
    from coca_scale.inference.load import model_digest

    names = sorted(captions or [])
    with ranks() as world:
        parts = world.agree(lambda: open_shards(shards, names))
        loaded = load(model, config, raw_weights, precision, world)
        facts = TeacherFacts(
            model=model,
            identity=world.on_first(lambda: model_digest(loaded.config, loaded.weights)),
            embed_dim=loaded.config.embed_dim,
            log_scale=float(loaded.model.logit_scale.log_scale),
            precision=precision.value,
            captions=names,
        )
        with progress_bar("shards", world.rank == 0) as progress:
            about = (loaded_encoder(loaded, world), facts, parts, progress, batch_size)
            job = world.agree(lambda: EmbedJob(*about))
            done = job.to_folder(out)
        if world.rank > 0:
            return
    before = f", {done.there} were there before" if done.there else ""
    rate = f"in {done.seconds:.1f} s ({done.per_second:.1f} pictures/s)"
    say(
        f"{done.written} pictures with {done.captions} captions embedded in {out} {rate}{before}"
        f"{skipped(done.bad)}"
    )
