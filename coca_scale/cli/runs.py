"""Verbs around a run: check, plan, slurm, translate, watch, report, doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from coca_scale.cli.arguments import Overrides, RecipeArgument, say
from coca_scale.errors import UserError
from coca_scale.recipe.whole_files import write_whole


def check_command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Processes of the planned job.")] = 1,
    device_gigabytes: Annotated[
        float | None, typer.Option(min=0.1, help="Memory per process; default: as found here.")
    ] = None,
) -> None:
    """Look at recipe, data, model and memory without training; lists every fault, then exits 1.

    Example: coca-scale check recipes/large.yaml --gpus 64 --device-gigabytes 80
    """
    from coca_scale.planning.check import check
    from coca_scale.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    device_bytes = None if device_gigabytes is None else int(device_gigabytes * 1e9)
    report = check(loaded, gpus, device_bytes)
    say(report.text())
    if report.faults:
        raise UserError(f"{recipe}: {len(report.faults)} fault(s)")


def plan_command(
    recipe: RecipeArgument,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs, which need not exist.")],
    gpu: Annotated[str, typer.Option(help="Their kind, such as h100-80gb or a100-40gb.")],
    overrides: Overrides = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    price: Annotated[
        float | None, typer.Option(min=0.0, help="Of a GPU for an hour, in euros.")
    ] = None,
    suggested: Annotated[
        bool, typer.Option("--suggest", help="Look for settings that make a step shorter.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All numbers as JSON.")] = False,
) -> None:
    """Memory, FLOPs, traffic, time and cost of a run; exits 1 if it does not fit.

    Example: coca-scale plan recipes/large.yaml --gpus 64 --gpu h100-80gb --price 2.50
    """
    from coca_scale.planning.gpus import GPUS
    from coca_scale.planning.plan_text import run_page
    from coca_scale.planning.staged import plan_stages, run_json
    from coca_scale.planning.suggest import suggest
    from coca_scale.recipe import load_recipe

    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu} is not known; use one of {', '.join(GPUS)}")
    loaded = load_recipe(recipe, overrides or ())
    about = (gpus, GPUS[gpu], gpus_per_node)
    stages = plan_stages(loaded, *about)
    found = [
        suggest(stage.recipe, *about, stage=stage.index) if suggested else None for stage in stages
    ]
    if as_json:
        say(json.dumps(run_json(stages, found, price), indent=1))
    else:
        say(run_page(stages, found, GPUS[gpu], gpu, price))
    for stage in stages:
        if not stage.plan.fits:
            of = f", {stage.name}" if stage.name else ""
            raise UserError(f"{recipe}{of}: {gpus} × {gpu} do not have the memory")


def doctor_command(
    quick: Annotated[
        bool, typer.Option("--quick", help="No all-reduce; for health checks.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of the table.")] = False,
) -> None:
    """Say what of this machine works, what does not, and the fix; exit 1 if training cannot work.

    Example: coca-scale doctor
    """
    from coca_scale.doctor.doctor import diagnose
    from coca_scale.doctor.table import show

    diagnosis = diagnose(quick)
    if as_json:
        say(diagnosis.json())
    else:
        show(diagnosis.rows)
    if diagnosis.faults:
        raise UserError(f"training does not work here: {', '.join(diagnosis.faults)}")
    if not as_json:
        left_out = "; the op was not loaded and no all-reduce was done" if quick else ""
        say(f"training works here{left_out}")


def slurm_command(
    recipe: RecipeArgument,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the job, one rank each.")],
    overrides: Overrides = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node.")] = 8,
    spares: Annotated[
        int, typer.Option(min=0, help="Nodes more, to take the place of those that fail.")
    ] = 0,
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
        recipe,
        overrides or (),
        gpus=gpus,
        gpus_per_node=gpus_per_node,
        spares=spares,
        time=time,
    )
    if out is not None:
        slurm.write(script, out)
        say(f"wrote {out}")
    if send:
        say(f"job {slurm.submit(script, out)}")
    elif out is None:
        say(script, nl=False)


def translate_command(
    command: Annotated[
        str, typer.Argument(metavar="COMMAND", help="The command in quotes, or a script with it.")
    ],
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs of the job; default: what the launcher says.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write instead of the screen.")] = None,
) -> None:
    """An OpenCLIP training command as a recipe; says what differs and what is missing.

    Example: coca-scale translate train_openclip.sh --gpus 8 --out recipe.yaml
    """
    from coca_scale.openclip.translate import translate

    found = translate(command, gpus)
    say(found.report(), err=True)
    if out is None:
        say(found.yaml(), nl=False)
    else:
        write_whole(out, found.yaml())
        say(f"wrote {out}; deepspeed coca_scale/train.py --recipe {out} --dry-run")


def watch_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one page and end.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON for each run and end.")
    ] = False,
) -> None:
    """How runs go, live in the terminal until Ctrl-C, from their files; of several a row each.

    Example: coca-scale watch runs/large
    """
    from coca_scale.reports.watch_page import Look, watch

    if as_json:
        for run in runs:
            say(json.dumps(Look(run).state().json()))
    else:
        watch(runs, every, once)


def report_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")],
) -> None:
    """One self-contained page: curves, throughput, memory, captions; several runs are overlaid.

    Example: coca-scale report runs/tiny runs/tiny2 --out report.html
    """
    from coca_scale.reports.page import report

    write_whole(out, report(runs))
    say(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")
