"""Wheel and sdist hold what they should, install clean, and carry a newcomer to the end."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import zipfile

import pytest

from tests.docs.blocks import ROOT
from tests.docs.sandbox import shell
from tests.json_lines import lines_of


def tracked(*folders):
    """Files of the repository, with those that are about to be added."""
    command = ["git", "ls-files", "-co", "--exclude-standard", *folders]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in names.split() if (ROOT / name).is_file()}


def test_the_wheel_has_the_package_and_nothing_else(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {n for n in wheel.namelist() if ".dist-info/" not in n}
        licence = [n for n in wheel.namelist() if n.endswith("LICENSE")]
    assert names == tracked("coca_scale")
    assert len(licence) == 1


def test_the_sdist_has_the_repository(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {n.partition("/")[2] for n in sdist.getnames() if sdist.getmember(n).isfile()}
    left_out = tracked() - names
    assert {n for n in left_out if not n.startswith(".")} == set()


def test_an_installed_wheel_needs_nothing_of_the_developers(installed, tmp_path):
    done = shell(
        "coca-scale --help; python -c 'import coca_scale; print(coca_scale.__file__)'",
        tmp_path,
        installed,
    )
    assert done.returncode == 0, done.stdout
    assert str(installed) in done.stdout
    assert shell("! python -c 'import pytest'", tmp_path, installed).returncode == 0


@pytest.mark.slow
def test_from_pictures_to_a_rehearsed_publication(copied, installed):
    shutil.copy(ROOT / "recipes" / "tiny.yaml", copied / "recipes" / "tiny.yaml")  # as it is
    done = shell("export STEPS=120; bash docs/journey.sh", copied, installed)
    assert done.returncode == 0, done.stdout[-6000:]
    folder = copied / "journey"
    log = (folder / "train.log").read_text()
    assert "resumed" in log and "finished" in log
    steps = [line["step"] for line in lines_of(folder / "run" / "metrics.jsonl")]
    assert steps[-1] == 120 and steps == sorted(set(steps))
    assert len(lines_of(folder / "captions.jsonl")) == 100
    scores = json.loads((folder / "retrieval.json").read_text())["scores"]
    assert (
        scores["image_to_text_r1"] > 0.1
    )  # chance is 0.01; drawings of one kind have equal captions
    assert (folder / "export" / "open_clip_model.safetensors").is_file()
    assert "<html" in (folder / "report.html").read_text()
    assert "coca-journey" in done.stdout
