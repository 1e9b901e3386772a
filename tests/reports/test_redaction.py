"""Everything that leaves: a secret in any text of a run is in no byte of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from coca_scale.recipe import dump_recipe, load_recipe
from coca_scale.reports.page import report
from coca_scale.reports.publish import prepare
from tests.secrets import SECRETS, SHAPES, recipe_with
from tests.variants import untrained_export

SECRET = "s3cr3tS3CR3Ts3cr3t"
LINE = {
    "step": 10,
    "loss": 2.0,
    "lr": 1e-3,
    "samples_seen": 160,
    "global_batch": 16,
    "samples_per_second": 9.0,
    "peak_memory_bytes": 1 << 30,
    "skipped_steps": 0,
    "bad_samples": 1,
    "grad_norm": 1.0,
}
TRACK = """
import sys
from pathlib import Path
from coca_scale.recipe import load_recipe
from coca_scale.training.tracking import Tracker
folder = Path(sys.argv[1])
tracker = Tracker(load_recipe(folder / "recipe.yaml"), folder, print)
tracker.log(1, {"train/loss": 1.0})
tracker.picture(1, folder / "sheet.png")
tracker.close()
"""


def write_run(folder: Path, text: str) -> Path:
    """A run that has told all it knows, with this text wherever it may come from outside."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe_with(text)), encoding="utf-8")
    (folder / "metrics.jsonl").write_text(json.dumps({**LINE, "host": text}) + "\n")
    bad = {"cause": f"filtered_{text}", "key": text, "shard": text}
    (folder / "bad_samples.jsonl").write_text(json.dumps(bad) + "\n")
    about = {"versions": {"torch": text, text: "1.0"}, "git_commit": text, "ranks": 2}
    (folder / "versions.json").write_text(json.dumps({**about, "host": text}))
    return folder


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A small model, and in its files what others may have put there."""
    return untrained_export(tmp_path_factory.mktemp("export"))


@settings(max_examples=25, deadline=None, phases=[Phase.generate])
@given(secret=SECRETS, shape=st.sampled_from(SHAPES))
def test_the_hub_gets_no_secret(export, tmp_path_factory, secret, shape):
    text = shape.replace("{}", secret)
    run = write_run(tmp_path_factory.mktemp("run") / secret, text)
    scores = run / "scores.json"
    found = {"task": "retrieval", "data": [text], "pictures": 3, "scores": {text: 0.5}}
    scores.write_text(json.dumps({**found, "model": text}))
    for name in ("open_clip_config.json", "coca_scale_config.json"):
        if (export / name).is_file():
            content = json.loads((export / name).read_text())
            content |= {"comment": text, "preprocess_cfg": {"mean": 0.5, text: text}}
            (export / name).write_text(json.dumps(content))
    (export / "tokenizer_config.json").write_text(
        json.dumps({"name_or_path": text, "pad_token": "<pad>", "special_tokens_map_file": text})
    )
    publication = prepare(export, "org/name", run, [scores])
    sent = {file.name: file.content for file in publication.files}
    assert {"README.md", "recipe.yaml", "tokenizer_config.json"} <= sent.keys()
    for name, content in sent.items():
        held = content if isinstance(content, bytes) else content.read_bytes()
        assert secret.encode() not in held, name
        assert secret not in name


@pytest.mark.parametrize("shape", ["{}", "simplecache::https://me:{}@node17/{}/a.tar?sig={}"])
def test_a_page_has_no_secret(tmp_path, shape):
    text = shape.replace("{}", SECRET)
    page = report([write_run(tmp_path / "a" / SECRET, text), write_run(tmp_path / "b", text + "x")])
    for private in (SECRET, "node17", str(tmp_path)):
        assert private not in page
    assert "data.train" in page, "that recipes differ is said"


@pytest.mark.parametrize("shape", ["https://me:{}@node17/a.tar?token={}", "/mnt/private/{}/x"])
def test_weights_and_biases_gets_no_secret(tmp_path, shape, monkeypatch):
    run = write_run(tmp_path / SECRET, shape.replace("{}", SECRET))
    recipe = load_recipe(run / "recipe.yaml", ["log.wandb=coca", f"run.dir={run}"])
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    (run / "sheet.png").write_bytes(Path("docs/captions.png").read_bytes())
    monkeypatch.setenv("WANDB_MODE", "offline")
    command = [sys.executable, "-c", TRACK, str(run), f"data.train=https://u:{SECRET}@h/a.tar"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    (log,) = (run / "wandb").glob("offline-run-*/*.wandb")
    uploaded = [log, *(p for p in (log.parent / "files").rglob("*") if p.is_file())]
    assert len(uploaded) == 2, "the picture, and no list of packages or settings of the machine"
    for file in uploaded:
        content = file.read_bytes()
        for private in (SECRET, "node17", "/mnt/private", str(tmp_path), str(Path.cwd())):
            assert private.encode() not in content
            assert private not in str(file.relative_to(log.parent))


def test_a_project_that_is_no_name_gets_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    recipe = load_recipe("recipes/tiny.yaml", ["log.wandb=https://me:hunter2@node17/x"])
    from coca_scale.training.tracking import Tracker

    lines: list[str] = []
    Tracker(recipe, tmp_path, lines.append).close()
    assert "does not look like the name of a project" in lines[0] and "hunter2" not in lines[0]
    assert not list(tmp_path.iterdir())


USE = """
import sys
from pathlib import Path
from coca_scale.recipe import load_recipe
from coca_scale.training.tracking import Tracker
Tracker(load_recipe("recipes/tiny.yaml", ["log.wandb=coca"]), Path(sys.argv[1]), print).close()
"""


def test_an_identity_that_makes_no_sense_is_replaced(tmp_path):
    (tmp_path / "wandb_id").write_bytes(b"\xff\xfe\0")  # as left by a full disk
    done = subprocess.run(  # wandb keeps its mode for the life of a process
        [sys.executable, "-c", USE, str(tmp_path)],
        env={**os.environ, "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "goes on without" not in done.stdout
    identity = (tmp_path / "wandb_id").read_text().strip()
    assert len(identity) == 12 and list(tmp_path.glob(f"wandb/offline-run-*-{identity}"))
