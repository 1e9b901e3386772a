"""The `coca-scale` command; training itself is started by `coca_scale/train.py`."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Annotated

import typer

from coca_scale.cli import data, evaluate, models, runs
from coca_scale.cli.arguments import say
from coca_scale.engine.planned import planned_rank
from coca_scale.errors import AgreedError, UserError, system_faults
from coca_scale.version import __version__

app = typer.Typer(
    help="Everything around the training of CoCa models: prepare data, check and plan runs, "
    "caption, evaluate, publish. Training itself: deepspeed coca_scale/train.py --recipe RECIPE",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"coca-scale {__version__}")
        raise typer.Exit


app.command("check")(runs.check_command)
app.command("plan")(runs.plan_command)
app.command("slurm")(runs.slurm_command)
app.command("translate")(runs.translate_command)
app.command("doctor")(runs.doctor_command)
app.add_typer(data.app, name="data")
app.command("caption")(models.caption_command)
app.add_typer(evaluate.app, name="eval")
app.command("export")(models.export_command)
app.command("publish")(models.publish_command)
app.command("demo")(models.demo_command)
app.command("watch")(runs.watch_command)
app.command("report")(runs.report_command)


def main() -> None:
    """Console entry: a user's mistake is one line and exit code 1."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # so far it just ended the process
        signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.disable(logging.WARNING)  # libraries' notes about themselves
    sys.argv = [word for word in sys.argv if not word.startswith("--local_rank=")]  # deepspeed's
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a log is no place for bars
    try:
        with system_faults():
            app()
    except UserError as error:
        if not isinstance(error, AgreedError) or planned_rank() == 0:
            say(f"coca-scale: {error}", err=True)
        sys.exit(1)
