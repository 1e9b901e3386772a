"""Commands of `coca-scale`, run in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from coca_scale.cli import app


def output_of(*arguments: object) -> str:
    """What a command prints that has to succeed, on a terminal of 80 columns."""
    done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "80"})
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output
