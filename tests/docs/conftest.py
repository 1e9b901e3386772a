"""The built wheel in an environment of its own, and a checkout at tiny scale beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs import sandbox
from tests.docs.blocks import ROOT

UV = str(Path(sys.executable).with_name("uv"))


def run(*command: str, cwd: Path = ROOT) -> str:
    """Output of a command that has to succeed."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-6000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, made from the sdist, which is there too."""
    source = tmp_path_factory.mktemp("source") / "coca-scale"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    for name in names:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("dist")
    run(UV, "build", "--no-build-isolation", "--out-dir", str(out), cwd=source)
    return out


@pytest.fixture(scope="session")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel what it asks for in the tested versions, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    wheel = next(built.glob("*.whl"))
    run(UV, "venv", "--quiet", "--python", sys.executable, str(folder))
    target = ["--python", str(folder / "bin" / "python")]
    pinned = ["--constraint", str(ROOT / "requirements.lock")]
    run(UV, "pip", "install", "--quiet", "--compile-bytecode", *target, *pinned, str(wheel))
    return folder


@pytest.fixture(scope="session")
def checkout(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with data and one trained model, `runs/published`; to be copied, not used."""
    folder = tmp_path_factory.mktemp("checkout")
    sandbox.write_checkout(folder)
    sandbox.write_data(folder)
    train = "deepspeed coca_scale/train.py --recipe recipes/tiny.yaml run.dir=runs/published"
    done = sandbox.shell(train, folder, installed)
    assert done.returncode == 0, done.stdout[-6000:]
    return folder


@pytest.fixture
def copied(checkout: Path, tmp_path: Path) -> Path:
    """A checkout of one's own."""
    folder = tmp_path / "coca-scale"
    shutil.copytree(checkout, folder, copy_function=os.link)
    return folder
