"""Runs whose launcher is killed or told to stop; each launch is of a launcher that people use."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coca_scale.engine.checkpoint import find_checkpoint, verify_checkpoint
from tests.ports import free_port

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "deepspeed": [BIN / "deepspeed", "--num_gpus=2", "--master_port={port}"],
    "torchrun": [BIN / "torchrun", "--nproc_per_node=2", "--master_port={port}"],
    "mpirun": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable],
}
ENDLESS = [
    *("--recipe", "recipes/tiny.yaml", "data.train=synthetic://shapes?count=512&size=48"),
    *("data.val=null", "data.workers=1", "data.lanes=4", "train.steps=100000"),
    *("train.global_batch=16", "train.micro_batch=8", "log.every_steps=1", "log.tensorboard=false"),
    "engine.start_timeout_minutes=2",  # one that hangs says where, before it is given up here
]


class Launch:
    """A run without an end, in a session of its own, after its second step."""

    def __init__(self, launcher, tmp_path):
        self.run = tmp_path / "run"
        self.log = tmp_path / "log"
        self.port = free_port()
        words = [str(word).format(port=self.port) for word in LAUNCHERS[launcher]]
        if shutil.which(words[0]) is None:
            pytest.skip(f"no {words[0]}")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*words, "coca_scale/train.py", *ENDLESS, f"run.dir={self.run}"],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "MASTER_PORT": str(self.port)},
            )
        self._wait(lambda: self.steps >= 2)

    @property
    def steps(self):
        metrics = self.run / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0

    def processes(self):
        """All that have the run's folder in their command, as launchers, ranks and loaders have."""
        own = f"run.dir={self.run}".encode()
        found = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if own in file.read_bytes():
                    found.append(int(file.parent.name))
            except OSError:
                continue
        return found

    def rank(self, number):
        """The process of a rank, which its loader processes stem from."""
        mark = f"RANK={number}\0".encode()
        ranks = [p for p in self.processes() if mark in Path(f"/proc/{p}/environ").read_bytes()]
        return min(ranks)

    def kill(self):
        """All that is left of the run; returns what that was."""
        left = self.processes()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return left

    def ended(self):
        """What was said, once nothing of the run is left."""
        self._wait(lambda: self.process.poll() is not None and not self.processes())
        return self.log.read_text()

    def _wait(self, condition, seconds=150):
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                left = self.kill()
                stacks = [file.read_text() for file in (self.run / "stacks").glob("*")]
                said = "\n".join([self.log.read_text()[-4000:], *stacks])
                load = os.getloadavg()
                raise TimeoutError(f"{left} after {seconds} s, load {load}\n{said}")
            time.sleep(0.2)


@pytest.fixture
def launched(tmp_path):
    """Starts runs that do not outlive the test, however it ends."""
    launches = []

    def start(launcher):
        launches.append(Launch(launcher, tmp_path))
        return launches[-1]

    yield start
    for launch in launches:
        launch.kill()


def kill_the_launcher(launch):
    launch.process.kill()


def press_ctrl_c(launch):
    os.killpg(launch.process.pid, signal.SIGINT)


def close_the_terminal(launch):
    os.killpg(launch.process.pid, signal.SIGHUP)


def stop_a_rank_that_does_not_speak_for_its_node(launch):
    os.kill(launch.rank(1), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "act"),
    [
        ("deepspeed", kill_the_launcher),
        ("deepspeed", press_ctrl_c),
        ("torchrun", kill_the_launcher),
        ("deepspeed", stop_a_rank_that_does_not_speak_for_its_node),
        pytest.param("deepspeed", close_the_terminal, marks=pytest.mark.long),
        pytest.param("torchrun", press_ctrl_c, marks=pytest.mark.long),
        pytest.param("mpirun", kill_the_launcher, marks=pytest.mark.long),
    ],
)
def test_a_run_without_its_launcher_saves_and_leaves(launcher, act, launched):
    launch = launched(launcher)
    act(launch)
    said = launch.ended()
    checkpoint = find_checkpoint(launch.run / "checkpoints")
    assert checkpoint is not None
    verify_checkpoint(checkpoint)
    if launcher == "mpirun":  # all that ranks say goes through it
        return
    left = re.findall(r"^left after step (\d+) of 100000, to be started again$", said, re.M)
    assert [int(step) for step in left] == [int(checkpoint.name[-8:])]
    assert said.count(": saving and leaving after this step") == 1
    assert "failed first" not in said
    assert "is dead" not in said
    assert "frame #" not in said
    assert not list(Path("/dev/shm").glob(f"*_{launch.port}_*"))


@pytest.mark.slow
def test_the_death_of_rank_0_is_told_before_the_launcher_ends_the_others(launched):
    launch = launched("deepspeed")
    os.kill(launch.rank(0), signal.SIGKILL)
    said = launch.ended()
    assert len(re.findall(r"^coca-scale: rank 0 on \S+ is dead: ", said, re.M)) == 1
    assert said.count("coca-scale: ") == 1
    assert "frame #" not in said


@pytest.mark.slow
def test_the_death_of_a_loader_process_is_told_in_a_line(launched):
    launch = launched("deepspeed")
    rank = launch.rank(1)
    loaders = [p for p in launch.processes() if _parent(p) == rank]
    os.kill(loaders[0], signal.SIGKILL)
    said = launch.ended()
    assert f"DataLoader worker (pid {loaders[0]}) is killed by signal: Killed, as where" in said
    assert "data.workers" in said
    assert said.count("coca-scale: ") == 1
    assert "Traceback" not in said


def _parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
