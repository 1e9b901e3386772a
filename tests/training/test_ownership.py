"""A run folder has one owner, whoever else starts, dies, sleeps or comes back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coca_scale.errors import UserError
from coca_scale.recipe.lock import Lock, file_claim, held, run_claim
from tests.disks import no_file_over
from tests.distributed.launching import start
from tests.json_lines import curve, lines_of
from tests.ranks import FORKED

HOLDER = """
import sys, time
from pathlib import Path
from coca_scale.recipe.lock import Lock, run_claim
lock = Lock.take(run_claim(Path(sys.argv[1])), 60)
print("mine", flush=True)
for line in sys.stdin:
    while line.strip() == "wait" and lock.holds():
        time.sleep(0.1)
    print("holds" if lock.holds() else lock.lost, flush=True)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that has the run folder; asked by a line, it says whether it still has.

    On the line "wait" once it has not.
    """
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def take(tmp_path):
    """Take the run folder here; given back at the end of the test."""
    locks = []

    def take_it(watch_seconds=60.0):
        locks.append(Lock.take(run_claim(tmp_path), watch_seconds))
        return locks[-1]

    yield take_it
    for lock in locks:
        lock.release()


def owner_file(folder: Path, lock: str = "lock") -> Path:
    (path,) = (folder / lock).iterdir()
    return path


def elsewhere(folder: Path, **changes) -> None:
    """Make the owner a process of another machine."""
    path = owner_file(folder)
    holder = json.loads(path.read_text()) | {"host": "n7", "boot": "another"} | changes
    path.write_text(json.dumps(holder))


def test_an_owner_that_lives_keeps_the_folder(other, take, tmp_path):
    before = owner_file(tmp_path).read_text()
    with pytest.raises(UserError, match=rf"is in use by process {other.pid} on .*another run\.dir"):
        take()
    assert owner_file(tmp_path).read_text() == before
    print(file=other.stdin)
    assert other.stdout.readline() == "holds\n"


def test_a_dead_owner_is_not_waited_for(other, take, capfd):
    other.kill()  # it stays a zombie, as a child that nobody waits for
    assert take(10_000).holds()
    assert f"from process {other.pid} on" in capfd.readouterr().err


def test_a_number_that_another_process_has_now_is_not_the_owner(other, take, tmp_path, capfd):
    path = owner_file(tmp_path)
    holder = json.loads(path.read_text())
    other.kill()
    path.write_text(json.dumps(holder | {"pid": os.getpid()}))
    assert take(10_000).holds()
    assert "which is dead" in capfd.readouterr().err


def test_an_owner_that_ended_in_order_leaves_nothing_to_say(take, tmp_path, capfd):
    for number in range(1, 4):
        take().release()
        assert owner_file(tmp_path).name == f"{number}.json"
    assert capfd.readouterr().err == ""


def test_an_owner_elsewhere_is_watched_until_it_counts_as_gone(take, tmp_path, capfd):
    take().release()
    elsewhere(tmp_path, released=False)
    assert take(1.0).holds()
    assert "on n7" in (said := capfd.readouterr().err)
    assert "no sign of life for 1 s" in said


def test_an_owner_elsewhere_that_shows_life_keeps_the_folder(take, tmp_path):
    take().release()
    elsewhere(tmp_path, released=False)
    path, over = owner_file(tmp_path), threading.Event()

    def beat():
        while not over.wait(0.2):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"in use by process .* on n7"):
            take()
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize(
    ("restart", "launch", "at_once"), [(2, 0, True), (1, 4, True), (1, 3, False), (0, 9, False)]
)
def test_a_job_that_is_started_again_does_not_wait_for_itself(
    restart, launch, at_once, take, tmp_path, monkeypatch, capfd
):
    """By SLURM, or by slurm/launch.sh in the same allocation."""
    take().release()
    elsewhere(tmp_path, released=False, job="7", restart=1, launch=3)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    monkeypatch.setenv("COCA_SCALE_LAUNCH", str(launch))
    assert take(10_000 if at_once else 1).holds()
    assert ("an earlier start of this job" in capfd.readouterr().err) == at_once


def test_an_owner_that_slept_finds_the_folder_taken(other, take):
    os.kill(other.pid, signal.SIGSTOP)
    lock = take(1.0)
    os.kill(other.pid, signal.SIGCONT)
    print("wait", file=other.stdin)
    assert f"was taken over by process {os.getpid()}" in other.stdout.readline()
    assert lock.holds()


@pytest.mark.parametrize(
    "name", ["9" * 30 + ".json", "007.json", "\u0663.json", "x.json", "1.json.old"]
)
def test_any_file_may_lie_beside_the_lock(name, take, tmp_path):
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock" / name).write_text("")
    assert take(0.0).holds()


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_not_opened_as_a_lock(make, take, tmp_path):
    (tmp_path / "lock").mkdir()
    make(path := tmp_path / "lock" / "1.json")
    with pytest.raises(UserError, match=rf"{path} is .*; move it away"):
        take()
    assert [path] == list((tmp_path / "lock").iterdir())


def test_what_comes_into_the_place_of_a_lock_ends_its_owner_or_nothing(take, tmp_path):
    lock = take()
    path = owner_file(tmp_path)
    path.unlink()
    os.mkfifo(path)
    lock._beat()  # damage is for whoever reads it
    assert lock.holds()
    os.mkfifo(path.with_name("2.json"))
    lock._beat()
    assert not lock.holds()


def test_the_lock_of_an_output_goes_with_its_owner(tmp_path):
    out = tmp_path / "o.jsonl"
    with held(file_claim(out)) as lock, pytest.raises(UserError, match="choose another --out"):
        assert lock.holds()
        Lock.take(file_claim(out))
    assert not list(tmp_path.iterdir())
    lock = Lock.take(file_claim(out))
    owner_file(tmp_path, ".o.jsonl.lock").unlink()  # another process took over, and has ended
    (tmp_path / ".o.jsonl.lock").rmdir()
    lock._beat()
    with pytest.raises(UserError, match="was taken over by another process"):
        lock.require()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_somebody_removes_stays_ones_own(take, tmp_path):
    lock = take()
    owner_file(tmp_path).unlink()
    (tmp_path / "lock").rmdir()
    lock._beat()
    assert lock.holds()
    assert owner_file(tmp_path).is_file()


def at_the_same_moment(folder, ready, results):
    ready.wait()
    try:
        lock = Lock.take(run_claim(folder), 60.0)
    except UserError as error:
        results.put(str(error))
    else:
        results.put("mine")
        ready.wait()  # the others have their answers
        lock.release()


def test_of_several_at_the_same_moment_one_wins(tmp_path):
    ready, results = FORKED.Barrier(5), FORKED.Queue()
    jobs = [
        FORKED.Process(target=at_the_same_moment, args=(tmp_path, ready, results)) for _ in range(5)
    ]
    for job in jobs:
        job.start()
    answers = sorted(results.get(timeout=120) for _ in jobs)
    for job in jobs:
        job.kill()
        job.join()
    assert answers.count("mine") == 1
    assert all("is in use by process" in answer for answer in answers if answer != "mine")


@given(
    st.binary(max_size=60) | st.dictionaries(st.text(), st.integers() | st.text()).map(json.dumps)
)
def test_a_damaged_lock_is_watched_like_any_other(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("run")
    (folder / "lock").mkdir()
    data = content if isinstance(content, bytes) else content.encode()
    (folder / "lock" / "41.json").write_bytes(data)
    lock = Lock.take(run_claim(folder), 0.0)
    assert owner_file(folder).name == "42.json"
    lock.release()


def wait_for_steps(folder, job, steps):
    deadline = time.monotonic() + 300
    while (
        not (folder / "metrics.jsonl").exists() or len(lines_of(folder / "metrics.jsonl")) < steps
    ):
        assert job.alive and time.monotonic() < deadline, job.output[-3000:]
        time.sleep(0.1)


@pytest.mark.slow
def test_of_two_jobs_the_second_ends_and_a_requeue_goes_on(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    long = ("train.steps=100000", "checkpoint.every_steps=2", "checkpoint.keep=null")
    first = start(folder, *long)
    wait_for_steps(folder, first, 3)
    written = (folder / "recipe.yaml").stat(), (folder / "versions.json").stat()

    second = start(folder, *long, "optim.lr=1e-4")  # its log is the same file
    assert second.wait() == 1
    assert first.alive
    assert first.output.count("is in use by process") == 1
    assert "Traceback" not in first.output
    assert written == ((folder / "recipe.yaml").stat(), (folder / "versions.json").stat())

    for process in first.processes:  # a node that is lost, and comes back
        os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    steps = len(lines_of(folder / "metrics.jsonl")) + 4
    third = start(folder, f"train.steps={steps}")
    assert third.wait() == 0, third.output[-3000:]
    metrics = (folder / "metrics.jsonl").read_text()
    kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
    for process in first.processes:
        os.kill(process.pid, signal.SIGCONT)
    assert first.wait() == 1
    assert first.output.count("was taken over by process") == 1
    assert "Traceback" not in first.output
    assert (folder / "metrics.jsonl").read_text() == metrics
    assert [line[0] for line in curve(folder, steps)]
    assert json.loads(owner_file(folder).read_text())["released"]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == kept


def lose_the_folder_while_a_save_is_written():
    """For a rank, before it starts: another job is there when the files are on the disk."""
    from coca_scale.training.pending import Pending

    written = Pending._result

    def taken_over(pending, rank):
        entries = written(pending, rank)
        if rank == 0:
            path = owner_file(pending.final.parents[1])
            path.with_name(f"{int(path.stem) + 1}.json").write_text("{}")
            time.sleep(1.0)  # an owner looks twice a second
        return entries

    Pending._result = taken_over


@pytest.mark.slow
def test_a_run_that_is_taken_over_while_it_saves_says_so_once(tmp_path):
    folder = tmp_path / "run"
    job = start(folder, prepare=lose_the_folder_while_a_save_is_written)
    assert job.wait() == 1
    assert job.output.count("was taken over by") == 1
    assert "could not be saved" not in job.output
    assert not [p for p in (folder / "checkpoints").iterdir() if p.name.endswith("3")]


def test_a_full_disk_leaves_no_lock_that_the_next_start_would_watch(tmp_path, capsys):
    with no_file_over(20), pytest.raises(UserError, match="cannot be written: File too large"):
        Lock.take(run_claim(tmp_path))
    assert list((tmp_path / "lock").iterdir()) == []
    Lock.take(run_claim(tmp_path)).release()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("count", ["", "x", "-1", "\u00b2", "9" * 5000])
def test_odd_variables_of_a_scheduler_are_no_obstacle(count, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", count)
    monkeypatch.setenv("SLURM_JOB_ID", "8" * 500)
    lock = Lock.take(run_claim(tmp_path))
    assert lock.holds()
    lock.release()
