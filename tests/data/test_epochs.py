"""Epochs are exact multisets of samples, whatever happens to the job that reads them."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter

import numpy as np
import pytest
import torch

from coca_scale.data.epoch_shards import EpochShards
from coca_scale.data.manifest import MANIFEST, SIZES
from coca_scale.data.sample import DataError, Position
from coca_scale.data.sources import open_source
from tests.conftest import tiny_recipe
from tests.data.loading import loader
from tests.data.shards import write_shards

LANES = 24  # deals to 1, 2 and 4 ranks
BATCH = 48
LAYOUTS = ((1, 1), (2, 3), (4, 2))  # ranks × workers


def job(train, ranks, workers, saved, **data):
    """One loader per rank, from the saved lane positions."""
    sizes = {"lanes": LANES, "batch": BATCH, "size": 16, "window": 7}
    for rank in range(ranks):
        yield iter(loader(train, rank, ranks, workers, saved, **sizes, **data))


def run_job(log, train, ranks, workers, saved, data):
    """What a killed job leaves: a line per step, with keys and positions."""
    parent = os.getppid()
    os.setsid()
    torch.set_num_threads(1)
    streams = list(job(train, ranks, workers, saved, **data))
    with log.open("a") as file:
        while os.getppid() == parent:  # or it would go on for ever after a killed test run
            batches = [next(stream) for stream in streams]
            assert [len(batch.keys) for batch in batches] == [BATCH // ranks] * ranks
            states = {k: v for batch in batches for k, v in batch.lanes.items()}
            keys = [key for batch in batches for key in batch.keys]
            line = json.dumps([keys, [states[lane] for lane in range(LANES)]])
            file.write(line + "\n")
            file.flush()


def complete_lines(log):
    text = log.read_text() if log.is_file() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def read_epochs(log, train, epochs, **data):
    """Keys by epoch of a job that is killed at random and comes back with another layout."""
    rng = random.Random(3)
    layouts = itertools.cycle(LAYOUTS)
    steps, kills = [], 0
    while not steps or min(position[0] for position in steps[-1][1]) < epochs:
        saved = steps[-1][1] if steps else None
        process = multiprocessing.get_context("fork").Process(
            target=run_job, args=(log, train, *next(layouts), saved, data)
        )
        process.start()
        target, deadline = len(steps) + rng.randrange(1, 12), time.monotonic() + 60
        while len(complete_lines(log)) < target:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        steps = complete_lines(log)
        log.write_text("".join(json.dumps(step) + "\n" for step in steps))  # half a line at most
    assert kills >= len(LAYOUTS)
    return split_epochs([keys for keys, _ in steps], train, epochs, **data)


def split_epochs(steps, train, epochs, **data):
    """Keys by epoch: a lane's share of the steps, cut where its epochs end."""
    recipe = tiny_recipe(data__train=train, **data)
    source = open_source(recipe.data.train, recipe.data, 0)
    of_lane = BATCH // LANES
    found = [Counter() for _ in range(epochs)]
    for lane in range(LANES):
        given = (key for keys in steps for key in keys[lane * of_lane : (lane + 1) * of_lane])
        for epoch, counter in enumerate(found):
            length = sum(1 for _ in source.lane(lane, LANES, Position(epoch)))
            counter.update(itertools.islice(given, length))
    return found


@pytest.mark.parametrize("manifest", [True, False])
def test_three_epochs_are_exact_across_kills_and_layouts(tmp_path, manifest):
    rng = np.random.default_rng(0)
    sizes = [int(n) for n in rng.integers(1, 22, 64)]
    train = write_shards(tmp_path, sizes)
    if manifest:
        listed = {f"{number:03d}.tar": size for number, size in enumerate(sizes)}
        (tmp_path / SIZES).write_text(str(listed).replace("'", '"'))
    every = Counter(f"{shard}_{i}" for shard, size in enumerate(sizes) for i in range(size))
    for found in read_epochs(tmp_path / "log", train, 3):
        assert found == every


def test_epochs_with_replacement_and_weights_are_exact_too(tmp_path):
    for name, count in (("a", 20), ("b", 12)):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, [6] * count)
    train = [
        {"shards": str(tmp_path / "a"), "weight": 0.5},
        {"shards": str(tmp_path / "b"), "weight": 2.0},
    ]
    names = [f"a{i}" for i in range(20)] + [f"b{i}" for i in range(12)]
    weights = np.array([0.5] * 20 + [2.0] * 12)
    for replacement in (False, True):
        found = read_epochs(tmp_path / f"log{replacement}", train, 3, data__replacement=replacement)
        plan = EpochShards(weights, None, 0, replacement)
        for epoch in range(3):
            # the keys of a and b are the same, which is how many of both a key must have
            drawn = Counter(names[i][1:] for i in plan.order(epoch))
            expected = {f"{shard}_{i}": n for shard, n in drawn.items() for i in range(6)}
            assert found[epoch] == expected


def test_weights_are_kept_over_epochs():
    weights = np.array([1.0] * 10 + [0.3] * 10 + [2.5] * 4)
    plan = EpochShards(weights, np.full(24, 7), seed=1, replacement=False)
    drawn = Counter(int(i) for epoch in range(10) for i in plan.order(epoch))
    assert [drawn[i] for i in range(24)] == [10] * 10 + [3] * 10 + [25] * 4
    assert plan.samples() == 7 * (10 + 3 + 10)
    assert len(set(map(tuple, (plan.order(epoch) for epoch in range(10))))) == 10
    drawn = Counter(
        int(i)
        for epoch in range(2000)
        for i in EpochShards(weights, None, epoch, replacement=True).order(0)
    )
    share = np.array([drawn[i] for i in range(24)]) / drawn.total()
    assert np.allclose(share, weights / weights.sum(), rtol=0.15)
    with pytest.raises(DataError, match="less than one shard"):
        EpochShards(np.array([0.4, 0.4]), None, 0, False)


def test_known_sizes_give_lanes_of_equal_length():
    counts = np.random.default_rng(0).integers(0, 40, 50)
    plan = EpochShards(np.ones(50), counts, 0, False)
    lanes = [plan.parts(lane, 16, epoch=2) for lane in range(16)]
    lengths = [sum(part.stop - part.first for part in parts) for parts in lanes]
    assert max(lengths) - min(lengths) <= 1
    found = Counter(
        (part.shard, i) for parts in lanes for part in parts for i in range(part.first, part.stop)
    )
    assert found == Counter((s, i) for s, count in enumerate(counts) for i in range(count))


def test_manifest_of_something_else_is_an_error(tmp_path):
    train = write_shards(tmp_path, [2])
    (tmp_path / MANIFEST).write_text('{"files": 3}')
    with pytest.raises(DataError, match=r"manifest\.json: not a list of shards"):
        open_source(train, tiny_recipe().data, 0)
