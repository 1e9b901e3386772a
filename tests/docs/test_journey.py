"""The whole journey, as a newcomer walks it: docs/journey.sh with the built wheel."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.docs.blocks import ROOT
from tests.docs.sandbox import shell


@pytest.mark.slow
def test_from_pictures_to_a_rehearsed_publication(copied, installed):
    shutil.copy(ROOT / "recipes" / "tiny.yaml", copied / "recipes" / "tiny.yaml")  # as it is
    done = shell("export STEPS=120; bash docs/journey.sh", copied, installed)
    assert done.returncode == 0, done.stdout[-6000:]
    folder = copied / "journey"
    log = (folder / "train.log").read_text()
    assert "resumed" in log and "finished" in log
    steps = [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").open()]
    assert steps[-1] == 120 and steps == sorted(set(steps))
    captions = [json.loads(line) for line in (folder / "captions.jsonl").open()]
    assert len(captions) == 100
    scores = json.loads((folder / "retrieval.json").read_text())["scores"]
    assert (
        scores["image_to_text_r1"] > 0.1
    )  # chance is 0.01; drawings of one kind have equal captions
    assert (folder / "export" / "open_clip_model.safetensors").is_file()
    assert "<html" in (folder / "report.html").read_text()
    assert "coca-journey" in done.stdout
