"""Killed at any moment while uploading, disk and all: the bucket goes on in the same curve."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from coca_scale.data import retries
from coca_scale.engine.checkpoint import PROGRESS, begin_folder, complete_folder, drop_old
from coca_scale.engine.ownership import Owner
from coca_scale.engine.train_engine import SCALE_FILE
from coca_scale.engine.watchdog import NoWatchdog
from coca_scale.engine.world import World
from coca_scale.engine.writing import write_hashed
from coca_scale.training.mirror import Mirror
from tests.buckets import BUCKET, complete, keys, require_whole
from tests.conftest import tiny_recipe
from tests.data.faulty_server import OF_UPLOADS, loopback_s3
from tests.json_lines import curve
from tests.ranks import FORKED, TrainingRanks

KEEP = 3
SHARDS = [f"state/shard_{number}.pt" for number in range(4)]
LOOP = {
    "samples_seen": 0,
    "bad_steps": {"skipped": 0, "spikes": 0, "spread": [0, 0.0, 0.0]},
    "skips": {"bad": 0, "filtered": 0, "causes": {}, "listed": 0},
    "lanes": [[0, 0, 0, 0, 0]],
    "model_cfg": {},
}


@pytest.fixture
def s3():
    with loopback_s3(about="", faults=(*OF_UPLOADS, *[None] * 16)) as found:
        yield found


def kill_again_and_again(client, run, kills, start, longest_seconds):
    """After every kill: what is complete in the bucket is whole, and nothing complete is lost.

    Args:
        client: of the server.
        run: folder in the bucket.
        kills: how many.
        start: starts something on an empty disk that can be killed.
        longest_seconds: most that it goes on when a checkpoint has arrived.

    Returns:
        How many kills came inside an upload.
    """
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    known: list[str] = []
    inside = 0
    for number in range(kills):
        about = f"seed {seed}, kill {number}"
        job = start()
        deadline = time.monotonic() + 300
        while complete(client, run)[:1] <= known[:1]:
            assert time.monotonic() < deadline, f"no progress, {about}"
            assert job.alive, about
            time.sleep(0.05)
        time.sleep(chance.uniform(0, longest_seconds))
        job.kill()
        found = complete(client, run)
        for name in found:
            require_whole(client, run, name)
        assert found[0] > max(known, default=""), about
        lost = [name for name in known if name > found[-1] and name not in found]
        assert len(found) >= min(KEEP, len(known)) and not lost, about
        known = found
        begun = {key.split("/")[-2] for key in keys(client, f"{run}/checkpoints/step_")}
        inside += any(name > found[0] for name in begun)
    return inside


class Chain:
    """A process that makes states, each of the one before, saves them and mirrors what it can."""

    def __init__(self, folder, steps):
        shutil.rmtree(folder, ignore_errors=True)
        about = (folder, steps, dict(os.environ))
        self.process = FORKED.Process(target=make_chain, args=about)
        self.process.start()

    @property
    def alive(self):
        return self.process.exitcode is None

    def kill(self):
        self.process.kill()
        self.process.join()


def make_chain(folder, steps, environ):
    os.environ.update(environ)
    retries.FIRST_WAIT_SECONDS = 0.01
    url = f"s3://{BUCKET}/chain"
    recipe = tiny_recipe(
        run__dir=str(folder),
        checkpoint__mirror=url,
        checkpoint__keep=KEEP,
        data__timeout_seconds=1.0,
        data__retries=9,
    )
    world, parent = World.alone(torch.device("cpu")), folder / "checkpoints"
    mirror = Mirror(url, recipe, world, Owner(None, True), NoWatchdog())
    newest = mirror.fetch(parent, None, [])
    step, state = 0, ""
    if newest is not None:
        step, state = int(newest.name[-8:]), digest(newest)
    while step < steps:
        step += 1
        final = parent / f"step_{step:08d}"
        files = save(final, step, state)
        state = digest(final)
        (folder / "metrics.jsonl").write_text(f"{state}\n")
        drop_old(parent, KEEP, None, mirror.spared)
        mirror.offer(final, files)
        for _ in range(10):
            if mirror.poll():
                mirror.finish()
            time.sleep(0.02)
    mirror.last(final)


def save(final, step, state):
    """A checkpoint whose files follow from the state before."""
    temporary = begin_folder(final)
    contents = {PROGRESS: json.dumps({"step": step, **LOOP}).encode(), SCALE_FILE: state.encode()}
    for name in SHARDS:
        number = int(hashlib.sha256(f"{state} {name}".encode()).hexdigest(), 16)
        contents[name] = np.random.default_rng(number).bytes(500_000)
    files = {
        name: write_hashed(temporary / name, lambda file, content=content: file.write(content))
        for name, content in contents.items()
    }
    complete_folder(temporary, final, files)
    return files


def digest(checkpoint):
    whole = b"".join((checkpoint / name).read_bytes() for name in (SCALE_FILE, *SHARDS))
    return hashlib.sha256(whole).hexdigest()


def kill_chains(s3, tmp_path, kills):
    client, _ = s3
    inside = kill_again_and_again(client, "chain", kills, lambda: Chain(tmp_path / "x", 10**6), 1.0)
    steps = int(complete(client, "chain")[0][-8:]) + 3
    last = Chain(tmp_path / "last", steps)
    last.process.join(240)
    assert last.process.exitcode == 0
    state = ""
    for step in range(1, steps + 1):
        final = tmp_path / "undisturbed" / f"step_{step:08d}"
        save(final, step, state)
        state = digest(final)
        shutil.rmtree(final)
    name = f"step_{steps:08d}"
    assert digest(tmp_path / "last" / "checkpoints" / name) == state
    found = complete(client, "chain")
    assert found[0] == name and len(found) == KEEP
    require_whole(client, "chain", name)
    there = {key.split("/")[2] for key in keys(client, "chain/checkpoints/step_")}
    assert all(rest > name for rest in there - set(found)), "what was cut off is swept away"
    return inside


@pytest.mark.slow
def test_killed_while_uploading(s3, tmp_path):
    assert kill_chains(s3, tmp_path, 5) > 0


@pytest.mark.long
def test_killed_at_thirty_moments_while_uploading(s3, tmp_path):
    inside = kill_chains(s3, tmp_path, 30)
    print(f"{inside} of 30 kills came inside an upload")
    assert inside > 10


class Training(TrainingRanks):
    """A run on one rank that saves after every step, on an empty disk."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        common = [
            "data.train=synthetic://shapes?count=512&size=48",
            *("data.val=null", "data.workers=0", "train.global_batch=4", "train.micro_batch=4"),
            *("log.every_steps=1", "log.tensorboard=false", "checkpoint.every_steps=1"),
            *("schedule.name=constant", f"checkpoint.keep={KEEP}", f"run.dir={folder}"),
            *("data.timeout_seconds=2", "data.retries=9"),
        ]
        log = folder.with_suffix(".log")
        super().__init__(log, "--recipe", "recipes/tiny.yaml", *common, *arguments, ranks=1)


@pytest.mark.long
def test_a_run_that_lost_its_disk_thirty_times_has_the_same_curve(s3, tmp_path):
    client, _ = s3
    mirror = f"checkpoint.mirror=s3://{BUCKET}/run"
    inside = kill_again_and_again(
        client, "run", 30, lambda: Training(tmp_path / "x", "train.steps=100000", mirror), 4.0
    )
    print(f"{inside} of 30 kills came inside an upload")
    assert inside > 10
    steps = int(complete(client, "run")[0][-8:]) + 5
    last = Training(tmp_path / "last", f"train.steps={steps}", mirror)
    assert last.wait() == 0, last.output[-3000:]
    undisturbed = Training(
        tmp_path / "undisturbed", f"train.steps={steps}", "checkpoint.every_steps=null"
    )
    assert undisturbed.wait() == 0, undisturbed.output[-3000:]
    assert curve(tmp_path / "last", steps) == curve(tmp_path / "undisturbed", steps)
