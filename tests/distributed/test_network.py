"""Runs on nodes with a network between them that is cut, loses packets or is slow."""

from __future__ import annotations

import json
import time

import pytest

from tests.json_lines import curve, lines_of
from tests.namespaces import Network, obstacle
from tests.ranks import TrainingRanks
from tests.variants import raw_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.cluster,
    pytest.mark.skipif(obstacle() is not None, reason=str(obstacle())),
]
NODES, STEPS = 3, 40
SILENCE_MINUTES = 0.1


class Job:
    """A rank on each node."""

    def __init__(self, network, folder, *changes):
        self.run = folder / "run"
        model = folder / "small.json"
        width = {f"{part}_cfg__width": 32 for part in ("vision", "text", "multimodal")}
        layers = {f"{part}_cfg__layers": 1 for part in ("vision", "text", "multimodal")}
        model.write_text(json.dumps(raw_config("coca_tiny", embed_dim=32, **width, **layers)))
        number = len([*folder.glob("log*")])
        self.ranks = TrainingRanks(
            folder / f"log{number}",
            *("--recipe", "recipes/tiny.yaml", f"run.dir={self.run}", f"model.name={model}"),
            *("data.train=synthetic://shapes?count=512&size=48", "data.val=null"),
            *("train.global_batch=12", "train.micro_batch=4", f"train.steps={STEPS}"),
            *("engine.zero_stage=2", "checkpoint.every_steps=4"),
            *("log.every_steps=1", "log.tensorboard=false", *changes),
            ranks=NODES,
            prepare=network.join,
        )

    @property
    def output(self):
        return self.ranks.output

    def wait_for(self, words):
        deadline = time.monotonic() + 300
        while words not in self.output:
            assert time.monotonic() < deadline and self.ranks.alive, self.output[-3000:]
            time.sleep(0.01)

    def ends(self):
        """Exit codes, of ranks that end long before any limit but that of silence."""
        self.ranks.wait(60)
        return [process.exitcode for process in self.ranks.processes]

    def failures(self):
        events = lines_of(self.run / "events.jsonl")
        return sorted(
            (event["host"] or "", event["what"]) for event in events if event["event"] == "failure"
        )


@pytest.fixture
def network():
    with Network(NODES) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The curve of a run that nothing happens to."""
    with Network(NODES) as running:
        job = Job(running, tmp_path_factory.mktemp("undisturbed"))
        assert job.ranks.wait() == 0, job.output[-3000:]
    return curve(job.run, STEPS)


def silent(*numbers):
    """What is told of nodes that give no sign of life."""
    named = ", ".join(f"rank {number - 1} on n{number}" for number in numbers)
    host = f"n{numbers[0]}" if len(numbers) == 1 else ""
    seconds = SILENCE_MINUTES * 60
    return (
        host,
        f"{named}: no sign of life for {seconds:.0f} s (stopped? node down?); all ranks end",
    )


def start_and_save(network, folder):
    job = Job(network, folder, f"engine.silence_timeout_minutes={SILENCE_MINUTES}")
    job.wait_for("saved step_00000004")
    return job


def goes_on(network, job, undisturbed):
    """Whether the same command ends like a run that nothing happened to."""
    network.cut = frozenset()
    again = Job(network, job.run.parent)
    assert again.ranks.wait() == 0, again.output[-3000:]
    assert "resumed from" in again.output
    assert curve(job.run, STEPS) == undisturbed


def test_a_node_that_is_cut_off_is_named_and_ends_both_sides(network, undisturbed, tmp_path):
    job = start_and_save(network, tmp_path)
    network.cut = frozenset({3})
    assert job.ends() == [70, 70, 70], job.output[-3000:]
    assert job.failures() == [silent(3)]
    assert job.output.count("coca-scale:") == 1
    assert "Traceback" not in job.output
    goes_on(network, job, undisturbed)


def test_where_the_store_is_cut_off_each_side_names_the_other(network, undisturbed, tmp_path):
    job = start_and_save(network, tmp_path)
    network.cut = frozenset({1})
    assert job.ends() == [70, 70, 70], job.output[-3000:]
    failures = job.failures()
    assert silent(1) in failures
    failures.remove(silent(1))
    # of two that are silent one may be found a moment before the other
    assert failures in ([silent(2, 3)], [silent(2)], [silent(3)])
    assert job.output.count("coca-scale:") == 2
    assert "Traceback" not in job.output
    goes_on(network, job, undisturbed)


@pytest.mark.parametrize("number", [2, 1], ids=["n2", "n1"])
def test_a_node_that_vanishes_is_named(number, network, undisturbed, tmp_path):
    job = start_and_save(network, tmp_path)
    network.vanish(number)
    assert job.ends() == [-9 if n == number else 70 for n in range(1, NODES + 1)]
    assert job.failures() == [silent(number)]
    assert job.output.count("coca-scale:") == 1
    assert "Traceback" not in job.output
    goes_on(network, job, undisturbed)


@pytest.mark.parametrize(("loss", "delay"), [(0.2, 0.0), (0.0, 0.2)], ids=["lost", "slow"])
def test_packets_that_are_lost_or_slow_cost_time_alone(loss, delay, network, undisturbed, tmp_path):
    job = Job(network, tmp_path, "engine.silence_timeout_minutes=1")
    job.wait_for("step 2/")
    network.loss, network.delay = loss, delay
    before = len(lines_of(job.run / "metrics.jsonl"))
    began = time.monotonic()
    job.wait_for(f"step {before + 2}/")
    print(f"\n2 steps in {time.monotonic() - began:.0f} s")
    assert network.disturbed > 100
    network.loss = network.delay = 0.0
    assert job.ranks.wait() == 0, job.output[-3000:]
    assert job.failures() == []
    assert "coca-scale:" not in job.output
    assert curve(job.run, STEPS) == undisturbed
