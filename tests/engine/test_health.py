"""Steps that are not finite, ranks that die or hang, disks that are full."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from coca_scale.engine.checkpoint import sweep
from coca_scale.engine.planned import planned_host
from coca_scale.engine.watchdog import _odd_ones_out
from coca_scale.engine.writing import write_hashed
from coca_scale.recipe.files import sha256_of
from coca_scale.training.bad_steps import LossSpread
from coca_scale.training.events import append_failure
from tests.conftest import tiny_recipe
from tests.json_lines import lines_of
from tests.ports import free_port
from tests.ranks import on_ranks

HOST = planned_host()


def train_with_poison(rank, ranks, folder, poisoned, changes, ahead=0):
    """A run in which rank 1's caption loss is NaN at the given forward passes.

    `ahead`: steps begun before one is looked at, 1 on a GPU.
    """
    from coca_scale.engine.launch import end_world, start_world
    from coca_scale.errors import AgreedError
    from coca_scale.training import run
    from coca_scale.training.trainer import Trainer

    calls = []

    class Poisoned(Trainer):
        def __init__(self, *args):
            super().__init__(*args)
            self._steps_ahead = ahead

        def _train_step(self, batch):
            calls.append(self.step + 1)
            super()._train_step(batch)

        def _load(self):
            super()._load()
            self.engine.module.caption_head.register_forward_hook(poison)

    def poison(module, inputs, output):
        return output * float("nan") if rank == 1 and len(calls) in poisoned else output

    run.Trainer = Poisoned
    recipe = tiny_recipe(run__dir=folder, train__micro_batch=8, **changes)
    world = start_world(60)
    try:
        run._train_stages(recipe, world, run.NoWatchdog())
        message = None
    except AgreedError as error:
        message = str(error)
    end_world()
    return message, calls


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ahead"), [(0, 0), (3, 0), (3, 1)])
def test_a_step_that_is_not_finite_is_skipped_and_listed(stage, ahead, tmp_path):
    changes = {"train__steps": 4, "engine__zero_stage": stage}
    results = on_ranks(train_with_poison, 2, str(tmp_path), [2], changes, ahead)
    assert [message for message, _ in results] == [None, None]
    metrics = lines_of(tmp_path / "metrics.jsonl")
    assert [line["skipped_steps"] for line in metrics] == [0, 1, 1, 1]
    assert metrics[1]["loss"] is None
    assert metrics[3]["loss"] < metrics[0]["loss"]
    (bad,) = lines_of(tmp_path / "bad_steps.jsonl")
    assert (bad["step"], bad["ranks"]) == (2, [1])
    assert len(bad["samples"]["1"]) == 8


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_bad_stretch_ends_the_run_or_is_gone_around(ahead, tmp_path):
    changes = {"train__steps": 6, "checkpoint__every_steps": 2, "health__max_bad_steps": 2}
    stopped = on_ranks(train_with_poison, 2, str(tmp_path / "stop"), [4, 5], changes, ahead)
    assert "2 steps in a row were skipped, the last at step 5" in stopped[0][0]
    changes["health__rollbacks"] = 1
    back = on_ranks(train_with_poison, 2, str(tmp_path / "back"), [4, 5], changes, ahead)
    assert back[0][0] is None
    again = [6] * ahead + [5, 6]  # what was begun meanwhile is begun anew
    assert back[0][1] == [1, 2, 3, 4, 5, *again]  # step 4 was saved, skipped as it was
    metrics = lines_of(tmp_path / "back" / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert metrics[-1]["loss"] is not None


def train_without_a_place_to_save(rank, ranks, folder):
    """A run in whose place for checkpoints a file turns up at the end; how it ends."""
    from coca_scale.engine.launch import end_world, start_world
    from coca_scale.errors import AgreedError
    from coca_scale.recipe.run_folder import CHECKPOINTS
    from coca_scale.training.trainer import Trainer

    class Hindered(Trainer):
        def _train_step(self, batch):
            super()._train_step(batch)
            if rank == 0 and self.step == self.last_step:
                (self.folder / CHECKPOINTS).rmdir()
                (self.folder / CHECKPOINTS).touch()

    recipe = tiny_recipe(run__dir=folder, checkpoint__every_steps=None, train__steps=1)
    world = start_world(60)
    try:
        Hindered(recipe, world).run()
        message = None
    except AgreedError as error:
        message = str(error)
    end_world()
    return message


@pytest.mark.slow
def test_a_run_whose_last_save_fails_at_once_fails(tmp_path):
    for message in on_ranks(train_without_a_place_to_save, 2, str(tmp_path)):
        assert message is not None
        assert message.startswith("the last checkpoint cannot be saved: ")


def test_spikes_are_told_from_noise():
    spread = LossSpread()
    usual = [spread.add(5.0 + 0.1 * ((7 * i) % 5)) for i in range(200)]
    assert max(usual) < 8
    assert spread.add(7.0) > 8
    again = LossSpread(*json.loads(json.dumps(spread.state())))
    assert again.add(7.0) == pytest.approx(spread.add(7.0))


WATCHED = """
import sys, time
from pathlib import Path
from coca_scale.engine.leaving import appoint_witness
appoint_witness()
from coca_scale.engine.launch import start_world
from coca_scale.engine.watchdog import Watchdog
from coca_scale.training.events import append_failure
world = start_world(60)
folder = Path(sys.argv[1])
tell = lambda ranks, told: append_failure(folder, {r: world.hosts[r] for r in ranks}, told)
watchdog = Watchdog(world, folder, float(sys.argv[4]), tell)
print("ready", flush=True)
try:
    with watchdog.phase("step 7", float(sys.argv[3])):
        for _ in range(10000):
            if world.rank == 1 and sys.argv[2] == "hang":
                time.sleep(1000)
            if world.rank == 1 and sys.argv[2] == "raise":
                raise RuntimeError("the disk of this node is broken")
            world.barrier()
            time.sleep(0.05)
except Exception as error:
    watchdog.fail(error)
"""


def watched(tmp_path, kind, seconds, victim=1, silence=300, launchers_store=False):
    """Three ranks in lockstep, one with a fault; exit codes and error texts."""
    port = free_port()
    environment = {**os.environ, "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    if launchers_store:
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # noqa: F841
    command = [sys.executable, "-c", WATCHED, str(tmp_path), kind, str(seconds), str(silence)]
    ranks = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(3)
    ]
    for process in ranks:
        while process.stdout.readline().strip() != "ready":
            assert process.poll() is None
    if kind in ("kill", "stop"):
        if not launchers_store:  # where one is silent from the beginning
            time.sleep(5)  # they have met
        ranks[victim].send_signal(signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    if kind == "stop":
        for process in ranks:
            if process is not ranks[victim]:
                process.wait(100)
        ranks[victim].kill()
    errors = [process.communicate(timeout=100)[1] for process in ranks]
    return [process.returncode for process in ranks], errors


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_and_ends_the_others(victim, tmp_path):
    """Rank 0 as any other, although it keeps the store."""
    codes, errors = watched(tmp_path, "kill", 90, victim)
    assert codes == [-9 if rank == victim else 70 for rank in range(3)]
    told = "".join(errors)
    assert len(re.findall(rf"^coca-scale: rank {victim} on \S+ is dead: ", told, re.M)) == 1
    assert told.count("coca-scale:") == 1
    assert "Traceback" not in told
    assert "frame #" not in told
    # once, unless the store that says who was first is gone as well
    assert set(failures(tmp_path)) == {(victim, f"rank {victim} on {HOST} is dead")}
    assert victim == 0 or len(failures(tmp_path)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "launchers_store"), [(0, False), (1, False), (0, True)], ids=["0", "1", "torchrun's"]
)
def test_a_rank_that_is_silent_for_too_long_ends_the_others(victim, launchers_store, tmp_path):
    codes, errors = watched(tmp_path, "stop", 90, victim, 4, launchers_store)
    assert codes == [-9 if rank == victim else 70 for rank in range(3)]
    told = "".join(error for rank, error in enumerate(errors) if rank != victim)
    assert "frame #" not in told
    assert len(re.findall(rf"rank {victim} on \S+: no sign of life for 4 s", told)) == 1
    ((rank, what),) = failures(tmp_path)
    assert rank == victim and "no sign of life for 4 s" in what


@pytest.mark.slow
def test_the_first_error_is_told_once(tmp_path):
    codes, errors = watched(tmp_path, "raise", 90)
    assert codes == [70, 70, 70]
    assert "rank 1 on" in errors[1]
    assert "failed first" in errors[1]
    assert "the disk of this node is broken" in errors[1]
    assert "".join(errors).count("Traceback") == 1
    reason = "RuntimeError: the disk of this node is broken"
    assert failures(tmp_path) == [(1, f"rank 1 on {HOST} failed first: {reason}")]


@pytest.mark.slow
def test_a_hang_names_the_rank_and_the_collective(tmp_path):
    codes, errors = watched(tmp_path, "hang", 5)
    assert codes == [70, 70, 70]
    told = "".join(errors)
    assert told.count("no progress for 5 s in step 7") == 1
    ((rank, what),) = failures(tmp_path)
    assert rank == 1 and what.startswith("no progress for 5 s in step 7; ")
    assert re.search(r"rank 1 on \S+: is at", told)
    assert re.search(r"rank 0 on \S+, rank 2 on \S+: waits in all_reduce ← world.py", told)
    assert (
        "sleep" in (tmp_path / "stacks" / "rank_00001.txt").read_text()
        or "<string>" in (tmp_path / "stacks" / "rank_00001.txt").read_text()
    )


def failures(folder):
    """Rank and message of every failure that the run folder knows; their node is this one."""
    events = lines_of(folder / "events.jsonl")
    assert {(event["event"], event["host"]) for event in events} <= {("failure", HOST)}
    return [(event["rank"], event["what"]) for event in events]


@pytest.mark.parametrize(
    ("whereabouts", "odd"),
    [
        ({"waits in all_reduce": [0, 2], "is at loader.py": [1]}, [1]),
        ({"waits in all_reduce": [0], "does not answer": [1]}, [1]),
        (
            {"waits in all_reduce": [0, 1], "waits in barrier": [2], "waits in broadcast": [3]},
            [2, 3],
        ),
        ({"waits in all_reduce": [0], "waits in barrier": [1]}, []),
        ({"is at zero.py": [0, 1, 2]}, []),
        ({"is at zero.py": [0, 2, 3], "is at loader.py": [1]}, [1]),
    ],
)
def test_who_is_at_fault_for_a_hang(whereabouts, odd):
    assert _odd_ones_out(whereabouts) == odd


def test_a_failure_names_a_node_if_it_is_one(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("COCA_SCALE_LAUNCH", "2")
    for at_fault in ({2: "n2"}, {2: "n2", 3: "n2"}, {1: "n1", 2: "n2"}, {}, {7: None}):
        append_failure(tmp_path, at_fault, "gone")
    found = lines_of(tmp_path / "events.jsonl")
    named = [(event["rank"], event["host"]) for event in found]
    assert named == [(2, "n2"), (None, "n2"), (None, None), (None, None), (7, None)]
    assert {(event["job"], event["restart"], event["launch"]) for event in found} == {("7", 0, 2)}


def missing_rank(rank, ranks):
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from coca_scale.engine.launch import LaunchError, roll_call

    port = int(os.environ["MASTER_PORT"])
    store = dist.TCPStore("127.0.0.1", port, None, rank == 0, timedelta(seconds=30), False)
    try:
        roll_call(store, rank, 3, torch.device("cpu"), 4.0)
    except LaunchError as error:
        text = str(error)
        assert error.at_fault == {2: None}
    if rank == 0:  # it holds the store, so it leaves last
        store.wait(["told/1"])
    else:
        store.set("told/1", "")
    return text


def test_a_rank_that_does_not_start_is_named():
    for text in on_ranks(missing_rank, 2):
        assert text.startswith("1 of 3 ranks did not start in time: rank 2")


def test_an_error_of_the_disk_comes_out_of_torch_save(tmp_path):
    import torch

    entry = write_hashed(tmp_path / "good.pt", lambda file: torch.save(torch.ones(9), file))
    assert entry["sha256"] == sha256_of(tmp_path / "good.pt")
    with pytest.raises(OSError, match="No space left"), Path("/dev/full").open("wb"):
        write_hashed(Path("/dev/full"), lambda file: torch.save(torch.ones(99999), file))


def test_leftovers_of_a_killed_run_are_swept(tmp_path):
    for name in ("step_00000002.incomplete", "step_00000004.replaced", "step_00000006.replaced"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000006").mkdir()
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000004", "step_00000006"]
