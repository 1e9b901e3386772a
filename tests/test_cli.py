"""What every verb says of itself."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner
from webdataset import TarWriter

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
        *("translate", "demo", "doctor", "watch"),
    }


@pytest.mark.parametrize("path", VERBS, ids=" ".join)
def test_help_has_an_example_and_fits_a_terminal(path):
    found = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80", "NO_COLOR": "1"})
    assert found.exit_code == 0
    assert max(map(len, found.output.splitlines())) <= 80
    assert "\x1b" not in found.output
    words = re.sub(r"\s+", " ", found.output)
    assert f"Example: coca-scale {' '.join(path)}" in words


def test_names_of_files_and_words_of_data_steer_no_terminal(tmp_path):
    shard = tmp_path / "a\x1b[2J\x9b31m\udce9.tar"
    with TarWriter(str(shard)) as writer:
        writer.write({"__key__": "a", "jpg": b"broken", "txt": "words"})
    found = CliRunner().invoke(app, ["data", "inspect", str(tmp_path)], color=True)
    assert "a\\x1b[2J\\x9b31m\\udce9.tar" in found.output
    code = "import sys; from coca_scale.cli import main; main()"
    missing = f"{shard}.gone.tar"
    command = [sys.executable, "-c", code, "eval", "retrieval", "none", missing]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "a\\x1b[2J\\x9b31m\\udce9.tar.gone.tar: matches nothing" in done.stderr
    for text in (found.output, done.stderr):
        assert not set(text) & {"\x1b", "\x9b"}


@pytest.mark.parametrize(
    "entry", [["-m", "coca_scale"], ["-m", "coca_scale.train"], ["coca_scale/train.py"]]
)
def test_ctrl_c_while_modules_are_imported_ends_a_command_without_a_word(entry, tmp_path):
    slow = "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
    (tmp_path / "pydantic.py").write_text(slow)
    process = subprocess.Popen(
        [sys.executable, *entry],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "")
    assert process.returncode == -signal.SIGINT


def test_verbs_have_one_way_to_a_terminal():
    others = {
        f"{path.name}:{node.lineno}"
        for path in Path("coca_scale/cli").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("typer.echo", "print")
    }
    assert {where.partition(":")[0] for where in others} <= {"__init__.py", "arguments.py"}
    assert len(others) == 2  # the version, and `say`


def test_version():
    assert CliRunner().invoke(app, ["--version"]).output == f"coca-scale {__version__}\n"
