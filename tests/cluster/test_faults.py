"""Jobs on several nodes of a real SLURM: to their end, and through faults without a trace."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from contextlib import contextmanager
from datetime import datetime, timedelta

import pytest

from tests.cluster.runs import SCRIPT, STEPS, TrainingJob, submit
from tests.json_lines import curve, lines_of

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


@contextmanager
def lost(cluster, node, data):
    """A node is gone in the block, and back behind it, where nothing is slow any more."""
    cluster.kill_node(node)
    try:
        yield
    finally:
        data.pause(0)
        cluster.start_node(node)


def test_zero3_over_two_nodes_to_its_end(undisturbed):
    losses = curve(undisturbed.run)
    assert len(losses) == STEPS
    assert losses[-1][0] < losses[0][0]
    assert (undisturbed.run / "export" / "open_clip_model.safetensors").is_file()
    log = undisturbed.log.read_text()
    assert "start 0.0 of job" in log
    assert f"0: finished {STEPS} steps" in log
    logs = {
        file.stem: file.read_text() for file in (undisturbed.log.parent / "logs").rglob("*.log")
    }
    assert len(logs) == 2, "a log for each node"
    assert sorted(f"0: step {STEPS}/{STEPS}" in text for text in logs.values()) == [False, True]


def test_the_shipped_layout_of_eight_nodes(cluster, cluster_data, tmp_path):
    changes = ["train.steps=2", "train.micro_batch=2", "data.lanes=8", "data.shuffle_window=2"]
    options = ["--nodes=8", "--ntasks-per-node=1"]
    job = submit(cluster, tmp_path, SCRIPT, *options, arguments=[*cluster_data.overrides, *changes])
    log = tmp_path / "job.out"
    assert cluster.wait_job(job, 400, log) == "COMPLETED", log.read_text()[-6000:]
    assert cluster.job(job)["TresPerNode"] == "gres:gpu:8"
    assert "8 ranks" in log.read_text()
    assert len(list((tmp_path / "logs").rglob("n*.log"))) == 8
    assert len(curve(tmp_path / "run")) == 2


def test_a_rank_killed_then_requeued_then_a_node_lost(cluster, cluster_data, undisturbed, tmp_path):
    cluster_data.pause(0.7)
    job = TrainingJob(cluster, tmp_path / "faults", cluster_data)
    job.wait_step(4, restarts=0)
    os.kill(job.rank(1), signal.SIGKILL)
    tell(f"a rank killed, started again in place: {job.wait_first_step('0.1'):.0f} s")
    assert cluster.job(job.id)["Restarts"] == "0"

    job.wait_step(8, restarts=0)
    cluster.output("scontrol", "requeue", job.id)
    tell(f"requeued, which waits 4 s and not 2 minutes here: {job.wait_first_step('1.0'):.0f} s")

    job.wait_step(13, restarts=1)
    with lost(cluster, job.nodes()[1], cluster_data):
        tell(f"a node lost, to the queue: {job.wait_first_step('2.0'):.0f} s")
        cluster_data.pause(0)
        job.finish()
    log = job.log.read_text()
    assert "a rank died (exit code 137) on n2; the ranks start again in place" in log
    assert "too few of its nodes can take ranks; job" in log
    assert log.count("launch: start ") == 4
    assert log.count("resumed from") == 3
    assert curve(job.run) == curve(undisturbed.run)


def test_a_node_drained_with_a_spare_one_then_the_first_node_lost(
    cluster, cluster_data, undisturbed, tmp_path
):
    cluster_data.pause(3)
    job = TrainingJob(cluster, tmp_path / "spare", cluster_data, "--nodes=3", SPARE_NODES="1")
    job.wait_step(3, restarts=0)
    first, drained, spare = job.nodes()
    cluster.output("scontrol", "update", f"nodename={drained}", "state=drain", "reason=test")
    try:
        seconds = job.wait_first_step("0.1")
        tell(f"a node drained, left for a spare one: {seconds:.0f} s")
        cluster.kill_node(first)
        seconds = job.wait_first_step("1.0")
        tell(f"the first node lost, the job back from the queue: {seconds:.0f} s")
        cluster_data.pause(0)
        job.finish()
    finally:
        cluster_data.pause(0)
        cluster.start_node(first)
        cluster.output("scontrol", "update", f"nodename={drained}", "state=resume")
    log = job.log.read_text()
    assert f"left {drained}, which SLURM drains; the ranks start again in place" in log
    assert f"start 0.1 of job {job.id} on {first},{spare}, 2 ranks" in log
    starts = [event for event in lines_of(job.run / "events.jsonl") if event["event"] == "start"]
    assert starts[-1]["why"] == f"the first node, {first}, was lost"
    assert cluster.job(job.id)["Restarts"] == "1"
    assert curve(job.run) == curve(undisturbed.run)


def test_a_node_lost_and_on_with_the_other(cluster, cluster_data, undisturbed, tmp_path):
    cluster_data.pause(0.7)
    job = TrainingJob(cluster, tmp_path / "elastic", cluster_data, ELASTIC="1")
    job.wait_step(7, restarts=0)
    kept, other = job.nodes()
    with lost(cluster, other, cluster_data):
        tell(f"a node lost, on with the other: {job.wait_first_step('0.1'):.0f} s")
        cluster_data.pause(0)
        job.finish()
    log = job.log.read_text()
    assert f"node {other} was lost; the ranks start again in place" in log
    assert f"start 0.1 of job {job.id} on {kept}, 1 ranks" in log
    assert cluster.job(job.id)["Restarts"] == "0"
    losses, usual = curve(job.run), curve(undisturbed.run)
    saved = int(re.search(r"resumed from \S*step_(\d+)", log)[1])
    assert losses[:saved] == usual[:saved] != [], "two ranks have made them"
    for mine, other in zip(losses, usual, strict=True):
        assert mine == pytest.approx(other, rel=1e-4)


def tell(what: str) -> None:
    """A time, for whoever runs this with -s."""
    print(f"\n{what}")


def test_told_to_stop_then_out_of_time(cluster, cluster_data, undisturbed, tmp_path):
    cluster_data.pause(1.5)
    job = TrainingJob(cluster, tmp_path / "signals", cluster_data, "--signal=USR1@10")
    try:
        job.wait_step(2, restarts=0)
        cluster.output("scancel", "--signal=TERM", job.id)

        job.wait_step(4, restarts=1)
        cluster_data.pause(4)  # or the job would be through before its time is
        # SLURM looks at the time every 30 seconds, and signals up to 30 seconds early
        end = datetime.now() + timedelta(seconds=38)
        cluster.output("scontrol", "update", f"JobId={job.id}", f"EndTime={end:%Y-%m-%dT%H:%M:%S}")
        job.wait_restart(2)
        cluster.output("scontrol", "update", f"JobId={job.id}", "TimeLimit=20")
    finally:
        cluster_data.pause(0)
    job.finish()
    log = job.log.read_text()
    assert log.count("was told to stop, and saved") == 2
    assert "TIMEOUT" not in log
    assert curve(job.run) == curve(undisturbed.run)


def test_the_stop_file_ends_a_job_for_good(cluster, cluster_data, tmp_path):
    cluster_data.pause(0.7)
    job = TrainingJob(cluster, tmp_path / "stop", cluster_data)
    try:
        job.wait_step(2, restarts=0)
        (job.run / "STOP").touch()
    finally:
        cluster_data.pause(0.3)
    job.finish()
    assert cluster.job(job.id)["Restarts"] == "0"
    assert 2 <= len(curve(job.run)) < STEPS
    assert (job.run / "checkpoints" / "latest").is_file()


def test_evaluation_array(cluster, undisturbed, tmp_path):
    data = "synthetic://shapes?split=val&count=4&size=48"
    job = cluster.submit(
        *("--array=0-1", "--cpus-per-task=1", "--mem=500", f"--output={tmp_path}/%a.out"),
        *("slurm/eval_array.sh", str(undisturbed.run), data),
        PYTHON=sys.executable,
        LOG_DIR=str(tmp_path / "logs"),
    )
    cluster.wait(lambda: not cluster.output("squeue", "-h", "-j", job), 300, "the array")
    checkpoints = sorted(p.name for p in (undisturbed.run / "checkpoints").glob("step_*"))
    assert len(checkpoints) == 2
    for checkpoint in checkpoints:
        for task, score in (("retrieval", "image_to_text_r1"), ("captioning", "cider")):
            (table,) = (undisturbed.run / "eval").glob(f"{checkpoint}.*.{task}.txt")
            assert table.read_text().startswith(f"{task}: 4 pictures")
            found = json.loads(table.with_suffix(".json").read_text())
            assert found["pictures"] == 4 and score in found["scores"]
    assert len(list(tmp_path.glob("*.out"))) == 2
