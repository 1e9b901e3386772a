"""Whole runs: under the deepspeed launcher, killed and resumed, exported, refused."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from coca_scale.cli import app
from coca_scale.data.synthetic import Shapes
from coca_scale.engine.checkpoint import find_checkpoint, verify_checkpoint
from coca_scale.errors import UserError
from tests.data.shards import write_shards
from tests.distributed.launching import STEPS, TINY, start
from tests.invoke import output_of
from tests.json_lines import curve, lines_of
from tests.ports import free_port
from tests.training.transactions import history, records


def under_deepspeed(*arguments):
    """A whole run on two ranks, as users start it; exit code and output."""
    command = [
        str(Path(sys.executable).with_name("deepspeed")),
        *("--num_gpus=2", f"--master_port={free_port()}"),
        *("coca_scale/train.py", "--recipe", "recipes/tiny.yaml", *TINY, *arguments),
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"WANDB_MODE": "offline"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    classes = folder.parent / "classes"
    shapes = Shapes(11, 48, "val")
    for number in range(11):  # an odd number, for two ranks
        name = shapes[number].caption.split()[-1]
        (classes / name).mkdir(parents=True, exist_ok=True)
        shapes[number].image.save(classes / name / f"{number}.png")
    measured = (f"eval.zeroshot={classes}", "eval.templates=simple", "eval.scored_captions=12")
    told = ("log.wandb=coca", "log.profile_steps=[2,3]")
    code, output = under_deepspeed(f"run.dir={folder}", *measured, *told)
    assert code == 0, output[-3000:]
    return folder, output


@pytest.mark.slow
def test_a_run_leaves_what_the_contract_says(finished):
    folder, output = finished
    keys = lines_of(folder / "metrics.jsonl")[-1]
    assert {
        *("step", "samples_seen", "loss", "contrastive_loss", "caption_loss", "lr", "grad_norm"),
        *("logit_scale", "samples_per_second", "samples_per_second_per_rank"),
        *("data_wait_fraction", "peak_memory_bytes", "skipped_steps", "bad_samples"),
    } <= keys.keys()
    assert (folder / "recipe.yaml").is_file()
    assert (folder / "export" / "open_clip_model.safetensors").is_file()
    assert list((folder / "tensorboard").iterdir())
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert names == ["latest", "step_00000009", "step_00000012"]
    assert (folder / "checkpoints" / "latest").read_text().strip() == "step_00000012"
    assert "validation at step 12" in output
    assert curve(folder, STEPS)[-1][0] < curve(folder, STEPS)[0][0]


@pytest.mark.slow
def test_weights_and_biases_gets_what_the_run_folder_has(finished):
    folder, _ = finished
    log = next((folder / "wandb").glob("offline-run-*/*.wandb"))
    rows = history(log)
    assert [row["_step"] for row in rows] == list(range(1, 13))
    for row, line in zip(rows, curve(folder, STEPS), strict=True):
        assert (row["train/loss"], row["train/grad_norm"], row["train/logit_scale"]) == line
    scores = json.loads((folder / "validation.jsonl").read_text())
    assert rows[-1]["val/cider"] == scores["cider"]
    picture = log.parent / "files" / rows[-1]["val/captions/path"]
    assert picture.read_bytes() == (folder / "validation" / "step_00000012.png").read_bytes()
    run = next(record.run for record in records(log) if record.HasField("run"))
    assert run.project == "coca"
    assert run.run_id == (folder / "wandb_id").read_text().strip()


@pytest.mark.slow
def test_the_named_steps_are_profiled(finished):
    folder, output = finished
    assert f"profile in {folder / 'profile'}" in output
    assert "aten::addmm" in (folder / "profile" / "operators.txt").read_text()
    with gzip.open(folder / "profile" / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert {"ProfilerStep#2", "ProfilerStep#3"} <= names
    assert not {"ProfilerStep#1", "ProfilerStep#4"} & names


@pytest.mark.slow
def test_killed_at_a_random_moment_and_resumed_is_the_same_run(finished, tmp_path):
    expected = curve(finished[0], STEPS)
    folder = tmp_path / "killed"
    seed = random.randrange(10**6)
    wait_for, extra = random.Random(seed).randint(3, 9), random.Random(seed).random() * 0.5
    first = start(folder)
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and first.alive:
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= wait_for:
            break
        time.sleep(0.02)
    time.sleep(extra)
    first.kill()
    again = start(folder)
    assert again.wait() == 0, again.output[-3000:]
    assert curve(folder, STEPS) == expected, f"seed {seed}"


@pytest.mark.slow
def test_export_caption_and_verify(finished, tmp_path):
    folder, _ = finished
    out = tmp_path / "export"
    assert "caption logits" in output_of("export", folder, "--out", out, "--verify")
    pictures = "synthetic://shapes?split=val&count=8&size=48"
    lines = []
    for name, model in (("run", folder), ("export", out)):
        file = tmp_path / f"{name}.jsonl"
        grid = tmp_path / f"{name}.png"
        output_of("caption", model, pictures, "--out", file, "--picture", grid)
        assert grid.stat().st_size > 1000
        lines.append(file.read_text())
    assert lines[0] == lines[1]
    assert len(lines[0].splitlines()) == 8


@pytest.mark.slow
def test_validation_on_two_ranks_finds_what_eval_finds(finished, tmp_path):
    folder, _ = finished
    found = lines_of(folder / "validation.jsonl")[-1]
    drawings = "synthetic://shapes?split=val&count=12&size=48"
    tasks = {
        "retrieval": (drawings, "--equal-captions"),
        "captioning": (drawings, "--method", "greedy", "--min-length", "0"),
        "zeroshot": (str(folder.parent / "classes"), "--templates", "simple"),
    }
    for task, arguments in tasks.items():
        out = tmp_path / f"{task}.json"
        output_of("eval", task, folder, *arguments, "--out", out)
        scores = json.loads(out.read_text())["scores"]
        prefix = "zeroshot_" if task == "zeroshot" else ""
        shared = [name for name in scores if f"{prefix}{name}" in found]
        assert len(shared) >= {"retrieval": 6, "captioning": 6, "zeroshot": 3}[task]
        for name in shared:
            assert found[f"{prefix}{name}"] == pytest.approx(scores[name], abs=1e-6), name
    assert found["step"] == 12 and found["samples"] == 12
    assert (folder / "validation" / "step_00000012.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_report_shows_runs_next_to_each_other(finished, tmp_path):
    import shutil

    from tests.browser import opened_browser, quiet_page

    other = tmp_path / "faster"
    kept = ("recipe.yaml", "versions.json", "metrics.jsonl", "validation.jsonl")
    other.mkdir()
    for name in kept:
        shutil.copy(finished[0] / name, other / name)
    recipe = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(recipe.replace("  lr: ", "  lr: 1"))
    with (other / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "los')  # a run that is writing
    out = tmp_path / "report.html"
    output_of("report", finished[0], other, "--out", out)
    assert "http" not in out.read_text().replace('="http://www.w3.org/', "")  # names, not addresses
    with opened_browser() as browser:
        for width in (1200, 360):
            with quiet_page(browser, width) as page:
                page.goto(out.as_uri())
                facts = page.inner_text("#facts")
                assert "coca_tiny" in facts and "faster" in facts and "R@1" in facts
                charts = page.locator("#charts svg")
                assert charts.count() >= 8
                assert all(box["width"] > 200 for box in boxes(charts))
                sheet = page.locator("img")
                assert sheet.count() == 1, "one of the runs has pictures"
                assert sheet.first.evaluate("image => image.naturalWidth") > 100
                assert page.locator("#differences tbody tr").count() == 1
                assert "optim.lr" in page.inner_text("#differences")
                assert page.evaluate("document.documentElement.scrollWidth") <= width
    for folder, message in ((tmp_path, "no recipe.yaml"), (tmp_path / "empty", "logged nothing")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        shutil.copy(other / "recipe.yaml", tmp_path / "empty" / "recipe.yaml")
        done = CliRunner().invoke(app, ["report", str(folder), "--out", str(out)])
        assert message in str(done.exception)


def boxes(locator):
    return [locator.nth(i).bounding_box() for i in range(locator.count())]


def test_damaged_checkpoints_are_refused(finished, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(finished[0] / "checkpoints" / "step_00000012", copy)
    verify_checkpoint(copy)
    victim = max(copy.rglob("*.pt"), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    with pytest.raises(UserError, match="is damaged"):
        verify_checkpoint(copy)
    victim.unlink()
    with pytest.raises(UserError, match="is missing"):
        verify_checkpoint(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a complete checkpoint"):
        verify_checkpoint(copy)
    assert find_checkpoint(tmp_path) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["train.micro_batchs=3"], 2, "did you mean train.micro_batch?"),
        (["data.train=/nowhere/{000..003}.tar"], 1, "4 of 4 shards are missing"),
        (["train.micro_batch=3"], 1, "train.micro_batch=2 would"),
        (["model.name=coca_ViT-Z"], 1, "is not known"),
    ],
)
def test_mistakes_end_all_ranks_with_one_line(overrides, code, message, tmp_path):
    job = start(tmp_path / "r", *overrides)
    assert job.wait() == code
    output = job.output
    assert output.count(message) == (1 if code == 1 else 2)  # a wrong recipe ends before ranks meet
    assert "Traceback" not in output


@pytest.mark.slow
def test_bad_data_on_one_rank_ends_the_others_too(tmp_path):
    shard = write_shards(tmp_path, [40])
    job = start(
        tmp_path / "r",
        f"data.train=pipe:test $RANK = 0 && cat {shard}",
        *("data.retries=0", "data.val=null", "data.lanes=2", "data.train_samples=40"),
    )
    assert job.wait() == 1
    assert "no usable sample" in job.output
    assert "Traceback" not in job.output


def test_dry_run_prints_the_plan_and_trains_nothing(tmp_path):
    command = [sys.executable, "coca_scale/train.py", "--recipe", "recipes/large.yaml", "--dry-run"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert "638,450,177 parameters" in done.stdout
    assert "accumulation 8" in done.stdout
    assert '"stage": 3' in done.stdout


@pytest.mark.parametrize("words", [["optim.\x1b[2Jlr=1"], ["--recipe", "/tmp/\x1b[2Jno.yaml"]])
def test_what_is_told_of_a_recipe_steers_no_terminal(words):
    command = [sys.executable, "coca_scale/train.py", "--recipe", "recipes/tiny.yaml", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 2
    assert "\x1b" not in done.stderr
    assert "\\x1b[2J" in done.stderr
