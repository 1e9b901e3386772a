"""Commands of `coca-scale`, run in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from coca_scale.cli import app
from coca_scale.errors import UserError


def output_of(*arguments: object) -> str:
    """What a command prints that has to succeed, on a terminal of 80 columns."""
    done = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "80"})
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def mistake_in(*arguments: object) -> str:
    """What a user is told who calls a command in vain."""
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert isinstance(done.exception, UserError), (done.output, done.exception)
    return str(done.exception)
