"""`coca-scale data`: prepare and inspect training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from coca_scale.cli.arguments import (
    CORES,
    Workers,
    progress_bar,
    say,
    skipped,
)
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
