"""What asks a run to leave or to save; signals come to processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from coca_scale.training.requests import SAVE_FILE, STOP_FILE, Asked, Requests, Signals

ALL = [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
# the main thread waits where no Python runs, as in a collective
RUN = """
import ctypes, os, sys, time
from coca_scale.training.requests import Signals
with Signals() as signals:
    if "training" in sys.argv:
        signals.to_be_saved()
    print("ready", flush=True)
    while signals.reason is None or "stuck" in sys.argv:
        ctypes.CDLL(None).usleep(200_000 if "stuck" not in sys.argv else 60_000_000)
    print(signals.reason, flush=True)
"""
LAUNCH = """
import os, subprocess, sys
subprocess.call(sys.argv[1:], env={**os.environ, "RANK": "0"})
"""


@pytest.fixture(autouse=True)
def hangups_are_heard():
    """By what is started, though whoever started the tests may have them ignored, as nohup does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def started(*words, launch=(), **options):
    """A run that is ready."""
    process = subprocess.Popen(
        [*launch, sys.executable, "-c", RUN, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", ALL)
def test_before_there_is_anything_to_save_a_signal_ends_a_run(number):
    run = started("stuck")
    run.send_signal(number)
    out, errors = run.communicate(timeout=50)
    assert (run.returncode, out) == (75, "")
    name = number.name
    assert errors == f"{name}: leaving at once, with nothing to save\n"


@pytest.mark.parametrize("number", ALL)
def test_afterwards_a_signal_is_noted_once(number):
    run = started("training")
    run.send_signal(number)
    out, errors = run.communicate(timeout=50)
    assert (run.returncode, out) == (0, f"{number.name}\n")
    assert len(errors.splitlines()) == 1
    assert errors.startswith(f"{number.name}: saving and leaving after this step")


def test_a_second_ctrl_c_ends_a_run_that_does_not_come_to_its_next_step():
    run = started("training", "stuck")
    run.send_signal(signal.SIGINT)
    assert "SIGINT: saving" in run.stderr.readline()
    run.send_signal(signal.SIGTERM)  # as DeepSpeed's launch does then
    while run.poll() is None:
        run.send_signal(signal.SIGINT)
        try:
            run.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
    assert run.returncode == 130
    assert run.stderr.read() == "SIGINT again: leaving at once\n"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_nohup_and_background_jobs_ignore_stays_ignored(number):
    run = started("training", preexec_fn=lambda: signal.signal(number, signal.SIG_IGN))
    run.send_signal(number)
    run.send_signal(signal.SIGUSR1)
    out, _ = run.communicate(timeout=50)
    assert out == "SIGUSR1\n"


@pytest.mark.parametrize(("words", "code"), [(["training"], 0), (["stuck"], 75)])
def test_a_rank_outlives_its_launcher_to_save_and_no_longer(words, code, tmp_path):
    launch = tmp_path / "launch.py"
    launch.write_text(LAUNCH)
    run = started(*words, launch=[sys.executable, str(launch)])
    run.kill()  # the launcher; what it has started is nobody's now
    out, errors = run.communicate(timeout=50)  # until the rank has closed them
    gone = "launch.py, which launched this rank, is gone"
    assert out == ("" if code else f"{gone}\n")
    assert len(errors.splitlines()) == 1
    assert errors.startswith(f"{gone}: ")


def test_what_a_run_is_asked_for(tmp_path):
    with Signals(whole_process=False) as signals:
        requests = Requests(tmp_path, None, 0, signals)
        assert requests.poll() == Asked()
        (tmp_path / SAVE_FILE).touch()
        assert requests.poll() == Asked(save=True)
        requests.answered(Asked(save=True))
        assert requests.poll() == Asked()
        (tmp_path / STOP_FILE).touch()
        assert requests.poll() == Asked(stop=True)
        requests.answered(Asked(stop=True))
        os.kill(os.getpid(), signal.SIGUSR1)
        while signals.reason is None:
            assert requests.poll() == Asked()
        assert requests.poll() == Asked(leave=True)
    assert Requests(tmp_path, 1e-9, 0, None).poll().save
    (tmp_path / STOP_FILE).touch()
    assert Requests(tmp_path, 1e-9, 1, None).poll() == Asked()  # rank 0 looks for all
