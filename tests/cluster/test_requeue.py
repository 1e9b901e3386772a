"""What becomes of real jobs after signals, limits and requests; a stand-in trains."""

from __future__ import annotations

import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from tests.cluster.runs import SCRIPT, settings

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

STANDIN = """#!/usr/bin/env bash
if [ "$1" = -m ]; then exec {python} "$@"; fi
trap 'echo got USR1; exit 75' USR1
trap 'echo got TERM; exit 75' TERM
echo begun
for _ in {{1..300}}; do sleep 0.3; done
"""


@pytest.fixture
def start(cluster, tmp_path):
    """Starts a job of four ranks on two nodes; returns its id once all ranks have begun."""
    python = tmp_path / "python"
    python.write_text(STANDIN.format(python=sys.executable))
    python.chmod(0o755)
    (tmp_path / "site.sh").write_text("")

    def begin(name: str, *options: str) -> str:
        log = tmp_path / f"{name}.out"
        sizes = ["--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--mem=100", "--time=30"]
        env = {**settings(tmp_path), "PYTHON": str(python)}
        batch = "train.micro_batch=16"  # divides over four ranks
        job = cluster.submit(*sizes, f"--output={log}", *options, SCRIPT, batch, **env)
        cluster.wait(lambda: log.exists() and log.read_text().count("begun") == 4, 30, name, log)
        return job

    return begin


def test_who_comes_back(cluster, start, tmp_path):
    cancelled, told, warned, late = (
        start("cancelled"),
        start("told"),
        start("warned", "--signal=USR1@60"),
        start("late", "--signal=USR1@1"),
    )
    cluster.output("scancel", cancelled)
    cluster.output("scancel", "--signal=TERM", told)
    # SLURM looks at limits every 30 seconds, and signals up to 30 seconds early
    for job, seconds in ((warned, 80), (late, 3)):
        end = datetime.now() + timedelta(seconds=seconds)
        cluster.output("scontrol", "update", f"JobId={job}", f"EndTime={end:%Y-%m-%dT%H:%M:%S}")

    def waits_again(job: str) -> bool:
        found = cluster.job(job)
        return found["JobState"] == "PENDING" and found["Restarts"] == "1"

    for name, job in (("told", told), ("warned", warned), ("late", late)):
        cluster.wait(lambda job=job: waits_again(job), 60, name, tmp_path / f"{name}.out")
        cluster.output("scancel", job)
    assert cluster.wait_job(cancelled, 20) == "CANCELLED"
    assert cluster.job(cancelled)["Restarts"] == "0"

    assert said(tmp_path / "cancelled.out") == "it is left at that"
    assert "got TERM" in (tmp_path / "told.out").read_text()
    warned_log = (tmp_path / "warned.out").read_text()
    assert "got USR1" in warned_log
    assert "TIME LIMIT" not in warned_log
    assert "TIME LIMIT" in (tmp_path / "late.out").read_text()
    for name in ("told", "warned", "late"):
        assert said(tmp_path / f"{name}.out") == "on from the newest checkpoint"


def said(log: Path) -> str:
    """The last five words of the launch file."""
    lines = [line for line in log.read_text().splitlines() if line.startswith("launch: ")]
    return " ".join(lines[-1].split()[-5:])
