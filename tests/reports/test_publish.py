"""Publishing, against a stand-in of the hub's API, by the hub library's own means."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from coca_scale.cli import app
from coca_scale.errors import UserError
from tests.data.shards import write_shards
from tests.json_lines import lines_of
from tests.reports.hub import GOOD, READ_ONLY, running_hub

SECRET = "s3cr3t"
REPO = "some-org/coca-small"
FEATURES = """
import sys, torch, open_clip
from coca_scale import load_model
torch.manual_seed(0)
images, words = torch.randn(2, 3, 48, 48), ["a small red circle", "a large blue star"]
found = []
for name in sys.argv[1:]:
    model, _, _ = open_clip.create_model_and_transforms(name)
    found.append(model.eval().encode_image(images, normalize=True))
    tokenizer = open_clip.get_tokenizer(name)
    found.append(model.encode_text(tokenizer(words), normalize=True))
    ours = load_model(name.removeprefix("local-dir:"))
    found.append(ours.encode_image(images))
    found.append(ours.encode_text(ours.tokenizer(words)))
half = len(found) // 2
print(max(float((a - b).abs().max()) for a, b in zip(found[:half], found[half:])))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A real run, with data that nobody may learn where it lies."""
    folder = tmp_path_factory.mktemp("private-place")
    shards = write_shards(folder, [32])
    recipe = yaml.safe_load(Path("recipes/tiny.yaml").read_text())
    recipe["run"]["dir"] = str(folder / "run")
    recipe["data"] |= {
        "train": [
            shards,
            f"pipe:cat {shards} # --token {SECRET}",
        ],
        "cache_dir": str(folder / "cache"),
        "train_samples": 64,
        "lanes": 2,
    }
    recipe["train"] = {"steps": 2, "global_batch": 8, "micro_batch": 8}
    recipe["eval"] = {"every_steps": None, "samples": 8, "scored_captions": 4}
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    code = f"from coca_scale import train_recipe; train_recipe({str(folder / 'r.yaml')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


@pytest.fixture(scope="module")
def hub():
    with running_hub() as running:
        yield running


def environment(address, cache, token=GOOD):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return {
        **kept,
        "HF_ENDPOINT": address,
        "HF_HOME": str(cache),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def publish(arguments, environ):
    command = [sys.executable, "-m", "coca_scale", "publish", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environ, check=False)


@pytest.fixture(scope="module")
def published(run, hub, tmp_path_factory):
    """The run's export on the hub."""
    scores = tmp_path_factory.mktemp("scores") / "zeroshot.json"
    content = {"data": ["/home/me/imagenet/val"], "task": "zeroshot", "pictures": 50_000}
    scores.write_text(json.dumps({**content, "scores": {"top_1": 0.5, "top_5": 0.75}}))
    environ = environment(hub.address, tmp_path_factory.mktemp("cache"))
    arguments = [str(run), "--repo", REPO, "--licence", "mit", "--private"]
    done = publish([*arguments, "--scores", str(scores)], environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert hub.address + "/" + REPO in done.stdout
    assert done.stderr == ""
    return hub.files[REPO]


@pytest.mark.slow
def test_all_files_arrive_in_one_commit(published, run, hub):
    for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "tokenizer.json"):
        assert published[name] == (run / "export" / name).read_bytes()
    assert set(published) == {
        *("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_config.json"),
        *("tokenizer.json", "tokenizer_config.json", "README.md", "recipe.yaml", "captions.png"),
    }
    assert published["captions.png"].startswith(b"\x89PNG")
    assert len(hub.commits) == 1
    assert hub.private[REPO]


@pytest.mark.slow
def test_the_card_says_what_was_done_and_nothing_private(published, run):
    card = ModelCard(published["README.md"].decode())
    assert card.data.license == "mit"
    assert card.data.pipeline_tag == "image-to-text"
    values = {(r.task_type, r.metric_type): r.metric_value for r in card.data.eval_results}
    last = lines_of(run / "validation.jsonl")[-1]
    assert values["image-text-retrieval", "image_to_text_r1"] == pytest.approx(
        100 * last["image_to_text_r1"], abs=0.01
    )
    assert values["image-to-text", "cider"] == pytest.approx(100 * last["cider"], abs=0.01)
    assert values["zero-shot-image-classification", "top_1"] == 50
    assert "16 in 2 steps of 8" in card.text
    assert "(private)" in card.text
    texts = b"".join(published[n] for n in published if n.endswith((".md", ".yaml", ".json")))
    for private in (SECRET, "private-place", "/home/me", str(run)):
        assert private.encode() not in texts
    recipe = yaml.safe_load(published["recipe.yaml"])
    assert recipe["train"]["global_batch"] == 8
    assert recipe["data"]["cache_dir"] == "cache", "a word that says nothing"


@pytest.mark.slow
def test_what_is_on_the_hub_is_the_model(published, run, hub, tmp_path):
    environ = environment(hub.address, tmp_path / "cache")
    names = [f"local-dir:{run / 'export'}", f"hf-hub:{REPO}"]
    command = [sys.executable, "-c", FEATURES, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.splitlines()[-1]) < 1e-6


@pytest.mark.slow
def test_the_python_of_the_card_runs(published, hub, tmp_path):
    from coca_scale.data.synthetic import Shapes

    Shapes(1, 48, "val")[0].image.save(tmp_path / "photo.jpg")
    code = re.search(r"```python\n(.*?)```", published["README.md"].decode(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code[1]],
        capture_output=True,
        text=True,
        env=environment(hub.address, tmp_path / "cache"),
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("tensor([[")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("token", "gone", "message"),
    [
        ("hf_unknown", False, "hf auth login"),
        (READ_ONLY, False, "may not write to"),
        (GOOD, True, "was not uploaded"),
    ],
)
def test_what_goes_wrong_is_one_line(run, hub, monkeypatch, token, gone, message):
    address = "http://127.0.0.1:9" if gone else hub.address
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", token)
    done = CliRunner().invoke(app, ["publish", str(run), "--repo", "other/new"])
    assert isinstance(done.exception, UserError)
    assert message in str(done.exception) and "\n" not in str(done.exception)
    assert "other/new" not in hub.files


@pytest.mark.slow
def test_a_dry_run_sends_nothing(run, hub, tmp_path):
    before = len(hub.requests)
    done = publish(
        [str(run / "export"), "--repo", REPO, "--dry-run"], environment(hub.address, tmp_path, "")
    )
    assert done.returncode == 0, done.stderr
    assert len(hub.requests) == before
    assert "# coca-small" in done.stdout and "open_clip_model.safetensors" in done.stdout
    assert "no licence chosen" in done.stderr


@pytest.mark.slow
def test_bad_arguments(run, tmp_path):
    def said(*arguments):
        result = CliRunner().invoke(app, ["publish", *arguments, "--dry-run"])
        return str(result.exception)

    assert "nor a run" in said(str(tmp_path), "--repo", REPO)
    assert "ORG/x" in said(str(run), "--repo", "x")
    assert "a//b" in said(str(run), "--repo", "a//b")
    assert "not scores" in said(str(run), "--repo", REPO, "--scores", str(run / "versions.json"))
    broken = tmp_path / "export"
    broken.mkdir()
    for path in (run / "export").iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[:1000])
    assert "damaged" in said(str(broken), "--repo", REPO)
    (broken / "open_clip_pytorch_model.bin").unlink()
    assert "missing" in said(str(broken), "--repo", REPO)
