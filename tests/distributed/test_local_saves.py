"""Runs that die between two checkpoints, and go on from what is on their nodes."""

from __future__ import annotations

import os
import shutil
import time
from functools import partial
from pathlib import Path

import pytest

from coca_scale.engine.checkpoint import MANIFEST
from coca_scale.planning.check import local_fault
from tests.conftest import tiny_recipe
from tests.distributed.launching import start
from tests.json_lines import curve, lines_of
from tests.ranks import on_ranks

STEPS = 12
LOCAL = {"checkpoint__local_every_steps": 2, "checkpoint__every_steps": 3}


class DiesError(Exception):
    """As a process does that is killed: nothing is tidied up."""


def as_a_node(rank, folder):
    """Make this rank the only one of a node, with a disk of its own."""
    disk = disks_of(folder) / f"n{rank + 1}"
    disk.mkdir(parents=True, exist_ok=True)
    os.environ.update(SLURMD_NODENAME=disk.name, TMPDIR=str(disk))


def disks_of(folder):
    return Path(f"{folder}.disks")


def saves_on(folder, host):
    """Complete ones of a node."""
    found = disks_of(folder) / host
    return {
        path.parent.name for path in found.glob(f"coca-scale-*/{host}/step_????????/{MANIFEST}")
    }


def lose(folder, *hosts):
    for host in hosts:
        for save in (disks_of(folder) / host).iterdir():
            shutil.rmtree(save)


def starts(rank, ranks, folder, deaths, changes, poisoned):
    """A run that dies after steps, each with the nodes that are lost then, and is started again.

    Returns:
        Notes of all starts, steps that were run, and what n1 held at each death.
    """
    from coca_scale.engine.launch import end_world, start_world
    from coca_scale.training import run
    from coca_scale.training.trainer import Trainer

    as_a_node(rank, folder)
    world = start_world(60)
    notes, held, steps, until = [], [], [], []

    class Mortal(Trainer):
        def run(self):
            notes.extend(self.setup.notes)
            return super().run()

        def _load(self):
            super()._load()
            self.engine.module.caption_head.register_forward_hook(poison)

        def _next_batch(self, batches, meter, saver, requests):
            if self.step == until[-1]:
                saver.finish()  # what is under way may be complete or not when a process is killed
                saver.local.finish()
                raise DiesError
            return super()._next_batch(batches, meter, saver, requests)

        def _train_step(self, batch):
            steps.append(self.step + 1)
            super()._train_step(batch)

    def poison(module, inputs, output):
        return output * float("nan") if len(steps) in poisoned else output

    run.Trainer = Mortal
    recipe = tiny_recipe(
        **{"run__dir": folder, "train__steps": STEPS, "train__micro_batch": 4} | changes
    )
    for death, lost in deaths:
        until.append(death)
        try:
            run._train_stages(recipe, world, run.NoWatchdog())
        except DiesError:
            held.append(saves_on(folder, "n1"))
        world.barrier()
        if rank == 0:
            lose(folder, *lost)
        world.barrier()
    end_world()
    return notes, steps, held


def go(folder, *deaths, ranks=2, poisoned=(), **changes):
    """All of it; the end of the run is a death of None."""
    return on_ranks(starts, ranks, str(folder), deaths, changes, poisoned)[0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    go(folder, (None, ()))
    return curve(folder, STEPS)


@pytest.mark.slow
def test_a_run_goes_on_from_its_nodes(undisturbed, tmp_path):
    folder = tmp_path / "run"
    deaths = [(5, ()), (8, ("n2",)), (11, ("n1", "n2")), (None, ())]
    notes, steps, held = go(folder, *deaths, **LOCAL)
    assert [note for note in notes if note.startswith("rescued")] == [
        "rescued step_00000004 from local saves on n1, n2",
        "rescued step_00000008 from local saves on n1; files of n2 came from partners",
    ]
    assert steps == [*range(1, 6), *range(5, 9), *range(9, 12), *range(10, 13)]
    assert held == [{"step_00000004"}, {"step_00000008"}, {"step_00000010"}]
    assert curve(folder, STEPS) == undisturbed
    assert [list((disks_of(folder) / host).iterdir()) for host in ("n1", "n2")] == [[], []]
    saves = [line for line in lines_of(folder / "events.jsonl") if line.get("kind") == "local"]
    assert [(line["step"], line["saves"]) for line in saves] == [(2, 1), (8, 1), (10, 1), (10, 1)]
    assert all(0 < line["blocked_seconds"] <= line["seconds"] for line in saves)
    written = sum(f.stat().st_size for f in (folder / "checkpoints").glob("step_00000012/*/*"))
    assert all(line["bytes"] == pytest.approx(written, rel=0.01) for line in saves)


@pytest.mark.slow
def test_fewer_ranks_go_on_from_the_nodes_of_more(undisturbed, tmp_path):
    folder = tmp_path / "run"
    go(folder, (5, ("n2",)), **LOCAL)
    notes, steps, _ = go(folder, (None, ()), ranks=1, **LOCAL)
    told = "rescued step_00000004 from local saves on n1; files of n2 came from partners"
    assert told in notes and any("into another layout" in note for note in notes)
    assert steps == [*range(5, STEPS + 1)]
    for changed, expected in zip(curve(folder, STEPS), undisturbed, strict=True):
        assert changed == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_a_rollback_does_not_end_in_the_bad_stretch(tmp_path):
    health = {"health__max_bad_steps": 2, "health__rollbacks": 1}
    about = {**LOCAL, **health}
    notes, steps, _ = go(tmp_path / "run", (None, ()), ranks=1, poisoned=(4, 5), **about)
    assert steps == [1, 2, 3, 4, 5, *range(4, STEPS + 1)]
    assert not any(note.startswith("rescued") for note in notes)


def prepare(folder):
    as_a_node(int(os.environ["RANK"]), folder)


def until(reached, job):
    deadline = time.monotonic() + 300
    while not reached():
        assert time.monotonic() < deadline and job.alive, job.output[-3000:]
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_ranks_and_a_lost_node_cost_a_few_steps(tmp_path):
    folder = tmp_path / "run"
    keys = ("train.steps=100000", "checkpoint.every_steps=null", "checkpoint.local_every_steps=2")
    job = start(folder, *keys, "log.tensorboard=false", prepare=partial(prepare, folder))
    until(lambda: max(saves_on(folder, "n1"), default="") >= "step_00000004", job)
    job.kill()
    lose(folder, "n2")
    newest = max(saves_on(folder, "n1"))
    before = curve(folder)
    again = start(folder, *keys, "log.tensorboard=false", prepare=partial(prepare, folder))
    until(lambda: "resumed from" in again.output, again)
    until(lambda: len(curve(folder)) > len(before), again)
    (folder / "STOP").touch()
    assert again.wait() == 0, again.output[-3000:]
    told = f"rescued {newest} from local saves on n1; files of n2 came from partners"
    assert told in again.output
    assert f"at step {int(newest[-8:])}; loaded" in again.output
    assert curve(folder)[: len(before)] == before
    assert saves_on(folder, "n1") == saves_on(folder, "n2") == set()


def test_a_folder_of_every_node_is_no_folder_here():
    assert local_fault(tiny_recipe(checkpoint__local_dir="/dev/shm")) is None
    fault = local_fault(tiny_recipe(checkpoint__local_dir="scratch"))
    assert fault is not None and "begin with /" in fault
