"""What every verb says of itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from coca_scale.cli import app
from coca_scale.version import __version__


def verbs(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """All of them, with those of groups."""
    for name, child in getattr(command, "commands", {}).items():
        if getattr(child, "commands", None):
            yield from verbs(child, (*path, name))
        else:
            yield (*path, name)


VERBS = list(verbs(typer.main.get_command(app)))


def test_there_are_all_of_the_contract():
    assert {path[0] for path in VERBS} == {
        *("check", "plan", "data", "caption", "eval", "export", "publish", "report", "slurm"),
        *("translate", "demo", "doctor"),
    }


@pytest.mark.parametrize("path", VERBS, ids=" ".join)
def test_help_has_an_example_and_fits_a_terminal(path):
    found = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80", "NO_COLOR": "1"})
    assert found.exit_code == 0
    assert max(map(len, found.output.splitlines())) <= 80
    assert "\x1b" not in found.output
    words = re.sub(r"\s+", " ", found.output)
    assert f"Example: coca-scale {' '.join(path)}" in words


def test_version():
    assert CliRunner().invoke(app, ["--version"]).output == f"coca-scale {__version__}\n"
