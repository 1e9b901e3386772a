"""Runs killed at any moment, inside saves too, and runs on a disk that is full."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from coca_scale.engine.checkpoint import complete_checkpoints, verify_checkpoint
from tests.json_lines import lines_of
from tests.ranks import TrainingRanks

SMALL = [
    "data.train=synthetic://shapes?count=512&size=48",
    *("data.val=null", "data.workers=0", "train.global_batch=4", "train.micro_batch=4"),
    *("log.every_steps=1", "log.tensorboard=false", "checkpoint.every_steps=1"),
]


def start(folder, log, *arguments):
    common = ("--recipe", "recipes/tiny.yaml", *SMALL, f"run.dir={folder}")
    return TrainingRanks(log, *common, *arguments, ranks=1)


def kill_again_and_again(folder, kills):
    """After every kill: what is named as complete is whole, and nothing complete is lost."""
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    checkpoints = folder / "checkpoints"
    known: set[str] = set()
    inside_saves = 0
    for number in range(kills):
        job = start(
            folder, folder.with_suffix(".log"), "train.steps=100000", "checkpoint.keep=null"
        )
        deadline = time.monotonic() + 300
        while {p.name for p in complete_checkpoints(checkpoints)} <= known:
            assert time.monotonic() < deadline, f"no progress, seed {seed}, kill {number}"
            assert job.alive, job.output[-3000:]
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 1.5))
        job.kill()
        inside_saves += any(p.name.endswith(".incomplete") for p in checkpoints.iterdir())
        found = complete_checkpoints(checkpoints)
        assert known <= {p.name for p in found}, f"seed {seed}, kill {number}"
        for folder_ in found:
            verify_checkpoint(folder_)
        for old in found[3:]:  # or the disk would fill
            known.discard(old.name)
            subprocess.run(["rm", "-r", str(old)], check=True)
        known |= {p.name for p in found[:3]}
    return inside_saves


@pytest.mark.slow
def test_killed_anywhere(tmp_path):
    kill_again_and_again(tmp_path, 3)


@pytest.mark.long
def test_killed_at_a_hundred_moments(tmp_path):
    inside = kill_again_and_again(tmp_path, 100)
    print(f"{inside} of 100 kills came inside a save")
    assert inside > 10


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 80 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(disk)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_leaves_the_run_alive_and_old_checkpoints_whole(small_disk, tmp_path):
    job = start(small_disk / "run", tmp_path / "log", "train.steps=8", "checkpoint.keep=null")
    assert job.wait() == 1
    output = job.output
    assert "warning: step_00000003 could not be saved: rank 0: No space left on device" in output
    assert "step 8/8" in output  # it went on
    assert "the last checkpoint cannot be saved" in output
    assert "Traceback" not in output
    saves = [e for e in lines_of(small_disk / "run" / "events.jsonl") if e["event"] == "save"]
    assert [e["step"] for e in saves] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all("No space left on device" in e["failure"] for e in saves[2:])
    assert all(e["bytes"] > 1e6 for e in saves[:2])
    found = complete_checkpoints(small_disk / "run" / "checkpoints")
    assert [p.name for p in found] == ["step_00000002", "step_00000001"]
    for folder in found:
        verify_checkpoint(folder)
    left = {p.name for p in Path(small_disk / "run" / "checkpoints").iterdir()}
    assert left == {"step_00000001", "step_00000002", "latest"}


@pytest.mark.slow
@pytest.mark.parametrize(("free", "named"), [(16, "tokenizer.json"), (34_000, "export/open_clip")])
def test_a_full_disk_ends_a_run_where_it_begins_and_ends(free, named, small_disk, tmp_path):
    filler = small_disk / "other files"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - free * 1000))
    job = start(small_disk / "run", tmp_path / "log", "train.steps=1")
    assert job.wait() == 1, job.output[-3000:]
    assert "Traceback" not in job.output
    assert [named in line and "make room there" in line for line in ours(job.output)] == [True]
    filler.unlink()
    again = start(small_disk / "run", tmp_path / "log2", "train.steps=1")
    assert again.wait() == 0, again.output[-3000:]


def wait_for(told, job):
    deadline = time.monotonic() + 300
    while told not in job.output:
        assert time.monotonic() < deadline and job.alive, job.output[-3000:]
        time.sleep(0.01)


@pytest.mark.slow
def test_a_full_disk_of_a_node_costs_a_run_its_local_saves_alone(small_disk, tmp_path):
    filler = small_disk / "other files"
    filler.write_bytes(bytes(40_000_000))
    keys = ("train.steps=100000", "checkpoint.every_steps=null", "checkpoint.local_every_steps=1")
    keys += (f"checkpoint.local_dir={small_disk}",)
    refused = start(tmp_path / "run", tmp_path / "log", *keys)
    assert refused.wait() == 1
    (line,) = ours(refused.output)
    assert "has 0.04 GB free, and two local saves take 0.06 GB there; make room" in line
    filler.unlink()
    job = start(tmp_path / "run", tmp_path / "log2", *keys)
    wait_for(" on the nodes: 28.6 MB in ", job)
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**20))
    wait_for("could not be saved on the nodes: ", job)
    (tmp_path / "run" / "STOP").touch()
    assert job.wait() == 0, job.output[-3000:]
    (line,) = [line for line in job.output.splitlines() if "could not be saved on" in line]
    assert "No space left on device" in line
    assert "they outlive a rank, not the node" in job.output
    assert len(complete_checkpoints(tmp_path / "run" / "checkpoints")) == 1
    assert list(small_disk.iterdir()) == [filler]


def ours(output):
    return [line for line in output.splitlines() if line.startswith("coca-scale:")]
