"""The `coca-scale` command; training itself is started by `coca_scale/train.py`."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Tools around CoCa training: check a recipe, pack data, caption, export to OpenCLIP.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Prepare and inspect training data.", no_args_is_help=True)
app.add_typer(data_app, name="data")

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
ImageColumn = Annotated[str, typer.Option(help="CSV/TSV column with the image path.")]
CORES = len(os.sched_getaffinity(0))
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]
CaptionColumn = Annotated[str, typer.Option(help="CSV/TSV column with the caption.")]


@data_app.command("pack")
def data_pack(
    source: Annotated[
        Path,
        typer.Argument(help="Folder with .txt side-cars (first line), .csv/.tsv, or COCO .json."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    images: Annotated[Path | None, typer.Option(help="Pictures of a COCO .json.")] = None,
    image_column: ImageColumn = "filepath",
    caption_column: CaptionColumn = "title",
    shard_samples: Annotated[int, typer.Option(min=1, help="Samples per shard.")] = 10000,
    max_side: Annotated[
        int | None, typer.Option(min=16, help="Scale larger pictures down, in pixels.")
    ] = None,
    workers: Workers = CORES,
) -> None:
    """Write WebDataset shards and manifest.json; goes on where an interrupted call stopped.

    Example: coca-scale data pack photos/ --out shards/
    """
    from coca_scale.data.pack import PackOptions, pack

    options = PackOptions(images, image_column, caption_column, shard_samples, max_side)
    with _progress("pictures") as progress:
        result = pack(source, out, options, workers, progress)
    typer.echo(f"{result.samples} samples in {result.shards} shards in {out}{_skipped(result.bad)}")


@data_app.command("inspect")
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
    workers: Workers = CORES,
) -> None:
    """Count what shards hold: samples, sizes, caption lengths, faults by cause.

    Example: coca-scale data inspect "shards/{000000..000009}.tar" --picture lengths.png
    """
    from coca_scale.data import inspection

    with _progress("shards") as progress:
        found = inspection.inspect_shards(shards, decode, workers, progress)
    typer.echo(found.text())
    if picture is not None:
        found.draw(picture)
        typer.echo(f"picture: {picture}")
    if out is not None:
        out.write_text(json.dumps(found.facts(), indent=1) + "\n")
    if write_manifest:
        typer.echo(f"wrote {inspection.write_manifest(found)}")


@app.command("check")
def check_command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE...]", help="Change the recipe.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Processes of the planned job.")] = 1,
    device_gigabytes: Annotated[
        float | None, typer.Option(min=0.1, help="Memory per process; default: as found here.")
    ] = None,
) -> None:
    """Look at recipe, data, model and memory without training; lists every fault, then exits 1.

    Example: coca-scale check recipes/large.yaml --gpus 64 --device-gigabytes 80
    """
    from coca_scale.recipe import load_recipe
    from coca_scale.training.check import check

    loaded = load_recipe(recipe, overrides or ())
    device_bytes = None if device_gigabytes is None else int(device_gigabytes * 1e9)
    report = check(loaded, gpus, device_bytes)
    typer.echo(report.text())
    if report.faults:
        raise ValueError(f"{recipe}: {len(report.faults)} fault(s)")


@app.command("plan")
def plan_command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe.")],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs, which need not exist.")],
    gpu: Annotated[str, typer.Option(help="Their kind, such as h100-80gb or a100-40gb.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE...]", help="Change the recipe.")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="All numbers as JSON.")] = False,
) -> None:
    """Memory, FLOPs, traffic, time and cost of a run; exits 1 if it does not fit.

    Example: coca-scale plan recipes/large.yaml --gpus 64 --gpu h100-80gb
    """
    from coca_scale.planning.gpus import GPUS
    from coca_scale.planning.page import plan_page
    from coca_scale.planning.plan import make_plan
    from coca_scale.recipe import BatchPlan, load_recipe
    from coca_scale.training.costs import count_costs
    from coca_scale.training.schedule import total_steps

    if gpu not in GPUS:
        raise ValueError(f"--gpu {gpu} is not known; use one of {', '.join(GPUS)}")
    loaded = load_recipe(recipe, overrides or ())
    batch = BatchPlan.from_recipe(loaded, gpus)
    known = loaded.train.epochs is None or loaded.data.train_samples is not None
    steps = total_steps(loaded.train, loaded.data.train_samples) if known else None
    costs = count_costs(loaded, batch)
    plan = make_plan(loaded, batch, costs, GPUS[gpu], gpus_per_node, steps)
    if as_json:
        typer.echo(json.dumps(plan.json(), indent=1))
    else:
        typer.echo(plan_page(loaded, batch, costs, plan, GPUS[gpu], gpu))
    if not plan.fits:
        raise ValueError(f"{recipe}: {gpus} × {gpu} do not have the memory")


@app.command("export")
def export_command(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    verify: Annotated[
        bool, typer.Option(help="Load the result with open_clip and compare outputs.")
    ] = False,
    config: ConfigOption = None,
    raw_weights: RawWeights = False,
) -> None:
    """Write an OpenCLIP model folder, or say why OpenCLIP cannot have this model.

    Example: coca-scale export runs/tiny --out runs/tiny/export --verify
    """
    from coca_scale.engine.export import export
    from coca_scale.engine.loading import load_model
    from coca_scale.openclip.folder import verify_folder

    loaded = load_model(model, config, raw_weights)
    obstacle = export(loaded, out)
    if obstacle is None:
        typer.echo(f"wrote {out}; load it with open_clip as local-dir:{out}")
    else:
        typer.echo(f"wrote {out} for coca-scale alone: {obstacle}")
    if verify:
        found = verify_folder(out, loaded.model)
        typer.echo("largest difference to open_clip on random inputs (fp32):")
        typer.echo(f"  image features  {found.image_features:.2e}")
        typer.echo(f"  text features   {found.text_features:.2e}")
        typer.echo(f"  caption logits  {found.caption_logits:.2e}")
        if not found.largest < VERIFY_TOLERANCE:
            raise ValueError(f"{out}: open_clip computes something else with this model")


@app.command("caption")
def caption_command(
    model: ModelArgument,
    inputs: Annotated[
        list[str], typer.Argument(help="Pictures, folders, .csv/.tsv, shards, synthetic://shapes.")
    ],
    out: Annotated[Path, typer.Option(help="JSONL file to write.")],
    picture: Annotated[Path | None, typer.Option(help="Also draw a PNG grid.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 64,
    image_column: ImageColumn = "filepath",
    caption_column: CaptionColumn = "title",
    config: ConfigOption = None,
    raw_weights: RawWeights = False,
) -> None:
    """Caption pictures (greedy search); compares with captions that come with them.

    Example: coca-scale caption runs/tiny photos/ --out captions.jsonl
    """
    from coca_scale.engine.loading import load_model
    from coca_scale.evaluation import captioning
    from coca_scale.recipe.schema import DataSection

    loaded = load_model(model, config, raw_weights)
    columns = {"image_column": image_column, "caption_column": caption_column}
    data = DataSection.model_validate({"train": inputs, **columns})
    bad: Counter[str] = Counter()
    pictures = captioning.read_pictures(inputs, data)
    temporary = out.with_name(out.name + ".tmp")
    with temporary.open("w") as file:
        items = captioning.caption_pictures(loaded, pictures, batch_size, bad)
        written = captioning.write_jsonl(items, file)
    temporary.replace(out)
    typer.echo(f"{len(written)} captions in {out}{_skipped(bad)}")
    known = [item for item in written if item.sample.caption]
    if known:
        right = sum(item.right for item in known)
        typer.echo(f"captions exactly right: {right} of {len(known)} ({right / len(known):.1%})")
        i2t, t2i = captioning.retrieval(loaded, [item.sample for item in known])
        typer.echo(f"retrieval R@1: image to text {i2t:.3f}, text to image {t2i:.3f}")
    if picture is not None:
        captioning.draw_grid(written[:GRID_PICTURES], picture)
        typer.echo(f"picture: {picture}")


@app.command("doctor")
def doctor_command(
    quick: Annotated[
        bool, typer.Option("--quick", help="No compiling and no all-reduce; for health checks.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of the table.")] = False,
) -> None:
    """Say what of this machine works, what does not, and the fix; exit 1 if training cannot work.

    Example: coca-scale doctor
    """
    from coca_scale.engine.doctor import diagnose
    from coca_scale.engine.report import show

    diagnosis = diagnose(quick)
    if as_json:
        typer.echo(diagnosis.json())
    else:
        show(diagnosis.rows)
    if diagnosis.faults:
        raise ValueError(f"training does not work here: {', '.join(diagnosis.faults)}")
    if not as_json:
        left_out = "; the op was not loaded and no all-reduce was done" if quick else ""
        typer.echo(f"training works here{left_out}")


@app.command("slurm")
def slurm_command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe.")],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the job, one rank each.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE...]", help="Change the recipe.")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    time: Annotated[
        str, typer.Option(help="Time limit; the job saves and queues itself again before it.")
    ] = "24:00:00",
    out: Annotated[Path | None, typer.Option(help="File to write instead of the screen.")] = None,
    send: Annotated[bool, typer.Option("--submit", help="Send it with sbatch.")] = False,
) -> None:
    """Write the sbatch script of a recipe, and with --submit send it.

    Example: coca-scale slurm recipes/large.yaml --gpus 64 --time 2-00:00:00 --submit
    """
    from coca_scale.planning import slurm

    script = slurm.render(
        recipe, overrides or (), gpus=gpus, gpus_per_node=gpus_per_node, time=time
    )
    if out is not None:
        out.write_text(script)
        typer.echo(f"wrote {out}")
    if send:
        typer.echo(f"job {slurm.submit(script, out)}")
    elif out is None:
        typer.echo(script, nl=False)


VERIFY_TOLERANCE = 1e-3
GRID_PICTURES = 30


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (what, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _skipped(bad: Counter[str]) -> str:
    if not bad:
        return ""
    causes = ", ".join(f"{count} × {cause}" for cause, count in bad.most_common())
    return f"; skipped {sum(bad.values())} ({causes})"


def main() -> None:
    """Console entry: a user's mistake is one line and exit code 1."""
    logging.disable(logging.WARNING)  # libraries' notes about themselves
    try:
        app()
    except (ValueError, OSError) as error:
        print(f"coca-scale: {error}", file=sys.stderr)
        sys.exit(1)
