"""Which processes launched a rank, seen by ranks that other processes launch in many ways."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys

import pytest

from coca_scale.recipe.process import Process

RANK = """
import json, sys
from coca_scale.engine.processes import launchers
print(json.dumps([process.name for process in launchers()]), flush=True)
sys.stdin.read()
"""
# what DeepSpeed's launch, torchrun and mpirun do
LAUNCH = """
import os, subprocess, sys
sys.exit(subprocess.call(
    [sys.executable, sys.argv[1], "--local_rank=0", *sys.argv[2:]], env={**os.environ, "RANK": "3"}
))
"""
RUNNER = """
import subprocess, sys
sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))
"""
RECIPE = ("--recipe", "some recipe.yaml", "run.name=é")


@pytest.fixture
def scripts(tmp_path):
    """Paths of the three."""
    for name, text in (("train", RANK), ("launch", LAUNCH), ("runner", RUNNER)):
        (tmp_path / f"{name}.py").write_text(text)
    return {name: str(tmp_path / f"{name}.py") for name in ("train", "launch", "runner")}


def found(*command, **environment):
    """What the rank at the end of a command says of its launchers."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMPI", "PMI"))}
    done = subprocess.run(
        command, input="", capture_output=True, text=True, check=True, env={**clean, **environment}
    )
    return json.loads(done.stdout)


def test_a_launch_is_what_gave_the_rank_its_number(scripts):
    launch = [sys.executable, scripts["launch"], scripts["train"], *RECIPE]
    assert found(*launch) == ["launch.py"]
    assert found(*launch, SLURM_PROCID="0") == ["launch.py"]  # in the batch script of a job
    inside = shlex.join([sys.executable, scripts["train"], *RECIPE]) + "; true"
    shell_between = f"import os; os.environ['RANK'] = '1'; os.system({inside!r})"
    assert len(found(sys.executable, "-c", shell_between)) == 1


def test_a_runner_above_the_launch_has_the_same_command(scripts):
    runner = [sys.executable, scripts["runner"], scripts["launch"], scripts["train"], *RECIPE]
    assert found(*runner) == ["launch.py", "runner.py"]
    assert found("timeout", "60", *runner) == ["launch.py", "runner.py", "timeout"]
    assert found("nice", "nohup", *runner) == ["launch.py", "runner.py"]  # they become it
    several = f"import os; os.system({shlex.join(runner)!r})"  # a program that starts runs
    assert found(sys.executable, "-c", several) == ["launch.py", "runner.py"]


@pytest.mark.parametrize(
    "line",
    [
        "{} & wait",
        "setsid -w {}; true",
        "export RANK=1; nohup {} & wait",
        "for RANK in 0; do RANK=$RANK {} & done; wait",
    ],
)
def test_a_shell_may_end_and_leave_a_run_behind(line, scripts):
    train = shlex.join([sys.executable, scripts["train"], *RECIPE])
    for shell in ("sh", "bash"):
        assert found(shell, "-c", line.format(train)) == []


def test_a_process_is_dead_before_anybody_has_looked_and_its_number_is_not_it():
    child = subprocess.Popen(["sleep", "60"])
    process = Process.at(child.pid)
    assert process.alive
    assert not Process(process.pid, process.started - 1).alive
    child.send_signal(signal.SIGSTOP)
    assert process.alive
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not taken away
    assert not process.alive
    child.wait()
    assert not process.alive
    assert Process.at(child.pid) is None
