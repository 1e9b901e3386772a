"""The check of a node before ranks start on it: what it finds, waits for and ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coca_scale.doctor import node
from coca_scale.errors import UserError

# a rank that has to be killed, with a process of its own, which is forked
RANK = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.fork()
os.write(1, b"ready\\n")
time.sleep(100)
"""


def check(folder, seconds=30, **variables):
    command = [sys.executable, "-m", "coca_scale.doctor.node", str(folder), "2", str(seconds)]
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_a_node_that_is_well_says_what_it_computes_with(tmp_path):
    assert check(tmp_path / "runs" / "a") == (0, "node: CPU\n", "")
    assert not list((tmp_path / "runs" / "a").iterdir())


def test_a_run_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    code, out, err = check(tmp_path / "file" / "run")
    assert (code, err) == (1, "")
    assert out.startswith("node: the run folder cannot be used: ")
    assert out.count("\n") == 1


def test_what_an_earlier_start_has_left_is_ended_and_nothing_else(tmp_path):
    here = {"SLURM_JOB_ID": "4711", "SLURMD_NODENAME": "n1"}
    others = [
        {**here, "COCA_SCALE_LAUNCH": "0"},
        {**here},  # the batch script
        {**here, "COCA_SCALE_LAUNCH": "0", "SLURMD_NODENAME": "n2"},
        {**here, "COCA_SCALE_LAUNCH": "0", "SLURM_JOB_ID": "4712"},
    ]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env=os.environ | mine,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        for mine in others
    ]
    try:
        for process in started:
            assert process.stdout.readline() == process.stdout.readline() == b"ready\n"
        assert check(tmp_path, **here) == (0, "node: CPU\n", "")
        # both ends of its pipe are gone, so its child is as well
        assert started[0].stdout.read() == b""
        assert [process.poll() for process in started] == [-9, None, None, None]
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_process_that_does_not_end_is_told(monkeypatch):
    monkeypatch.setattr(node, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(node, "_of_this_job", lambda: [node.Process.at(os.getpid())])
    monkeypatch.setattr(os, "kill", lambda *_: None)
    with pytest.raises(UserError, match=f"process {os.getpid()} of an earlier start does not end"):
        node.end_leftovers(time.monotonic())


def test_full_temporary_folders(monkeypatch):
    monkeypatch.setattr(node, "LEAST_BYTES", 2**70)
    with pytest.raises(UserError, match=r"^/dev/shm is full: \d+ MB are free$"):
        node.look_at_room()


def test_a_check_that_hangs_ends_itself(tmp_path):
    (tmp_path / "numpy.py").write_text("import time\ntime.sleep(100)\n")
    code, out, _ = check(tmp_path / "run", 2, PYTHONPATH=f"{tmp_path}{os.pathsep}{Path.cwd()}")
    assert (code, out) == (1, "node: no end after 2 s while a product is computed\n")
