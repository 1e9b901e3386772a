"""A run's mirror in a bucket, over connections that break."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time

import pytest

from coca_scale.data import retries
from coca_scale.engine.checkpoint import find_checkpoint, verify_checkpoint
from coca_scale.engine.ownership import owned
from coca_scale.engine.watchdog import NoWatchdog
from coca_scale.errors import UserError
from coca_scale.planning.check import check
from coca_scale.recipe.exits import REQUEUE
from coca_scale.recipe.load import RecipeError
from coca_scale.recipe.lock import run_claim
from coca_scale.training.mirror import mirror_of
from coca_scale.training.mirrored import MirroredRun
from coca_scale.training.trainer import Trainer
from tests.buckets import BUCKET, complete, content, keys, require_whole
from tests.conftest import tiny_recipe
from tests.data.faulty_server import OF_UPLOADS, loopback_s3
from tests.distributed.launching import start
from tests.json_lines import curve, lines_of
from tests.ranks import on_ranks, quiet

STEPS = 8


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture(scope="module")
def s3():
    with loopback_s3(about="", faults=(*OF_UPLOADS, *[None] * 13)) as found:
        yield found


@pytest.fixture
def calm(s3):
    """The same without faults, until the test is over."""
    client, proxy = s3
    proxy.active = False
    yield client, proxy
    proxy.active, proxy.down = True, False
    proxy.opened.set()


def recipe(folder, run, **changes):
    common = {
        "run__dir": str(folder),
        "train__steps": STEPS,
        "checkpoint__every_steps": 2,
        "checkpoint__keep": 2,
        "checkpoint__mirror": f"s3://{BUCKET}/{run}" if run else None,
        "data__timeout_seconds": 2.0,
        "data__retries": 9,
    }
    return tiny_recipe(**common | changes)


def train(_rank, _ranks, recipes):
    """For `on_ranks`: train recipes one after the other; what ends one in its place."""
    from coca_scale.engine.launch import start_world

    retries.FIRST_WAIT_SECONDS = 0.01
    world, ends = start_world(60), []
    with quiet():
        for one in recipes:
            with owned(run_claim(one.run.folder), world) as owner:
                try:
                    mirror = mirror_of(one, world, owner, NoWatchdog())
                    trainer = Trainer(one, world, owner=owner, mirror=mirror)
                    trainer.run()
                    trainer.close()
                except UserError as error:
                    ends.append(str(error))
                else:
                    ends.append(None)
    return ends


def test_a_mirror_that_cannot_be_one_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for name, there in (("folder", True), ("file", False)):
        mirror = str(tmp_path / name)
        report = check(tiny_recipe(checkpoint__mirror=mirror, data__retries=0), 1)
        found = report.fine if there else report.faults
        assert any(line.startswith(f"checkpoint.mirror: {mirror}") for line in found)
    for url, message in [
        ("https://host/x", "cannot be written to"),
        ("ftp://me:secret@host/x", "no passwords in a recipe"),
        ("filecache::ftp://me:secret@host/x", "no passwords in a recipe"),
    ]:
        with pytest.raises(RecipeError, match=message) as found:
            tiny_recipe(checkpoint__mirror=url)
        assert "secret" not in str(found.value)


@pytest.mark.slow
def test_a_run_goes_on_from_its_bucket_on_an_empty_disk(s3, tmp_path):
    client, proxy = s3
    proxy.done.clear()
    every = {"checkpoint__every_steps": 3}
    first, again = (recipe(tmp_path / name, "run", **every) for name in ("first", "again"))
    bystanders = ["run/checkpoints/notes.txt", "run/checkpoints/step_00000001/rest", "runner/x"]
    for key in bystanders:
        client.put_object(Bucket=BUCKET, Key=key, Body=b"x")
    alone = recipe(tmp_path / "alone", None)
    assert on_ranks(train, 1, [alone, first]) == [[None, None]]
    assert sum(proxy.done.values()) > 10
    expected = curve(tmp_path / "alone")
    assert curve(tmp_path / "first") == expected

    newest, before = complete(client, "run")  # keep=2; not every one, as uploads take longer
    assert newest == "step_00000008"
    for name in (newest, before):
        require_whole(client, "run", name)
    assert content(client, "run/checkpoints/latest") == b"step_00000008\n"
    left = [key for key in bystanders if keys(client, key)]
    assert left == ["run/checkpoints/notes.txt", "runner/x"]  # the other one was half a checkpoint
    for file in ("metrics.jsonl", "events.jsonl", "recipe.yaml", "versions.json", "tokenizer.json"):
        assert content(client, f"run/{file}") == (tmp_path / "first" / file).read_bytes()
    for path in (tmp_path / "first" / "export").iterdir():
        assert content(client, f"run/export/{path.name}") == path.read_bytes()
    events = lines_of(tmp_path / "first" / "events.jsonl")
    mirrored = [e for e in events if e["event"] == "save" and e.get("kind") == "mirror"]
    assert mirrored[-1]["step"] == STEPS and mirrored[-1]["bytes"] > 1e6
    assert not any("failure" in event for event in mirrored)

    state = next(key for key in keys(client, "run/checkpoints/step_00000008/") if "optim" in key)
    damaged = content(client, state)[:-1] + b"!"
    client.put_object(Bucket=BUCKET, Key=state, Body=damaged)
    shutil.rmtree(tmp_path / "first")
    assert on_ranks(train, 1, [again]) == [[None]]
    assert curve(tmp_path / "again") == expected  # the first steps are from the bucket
    starts = [e for e in lines_of(tmp_path / "again" / "events.jsonl") if e["event"] == "start"]
    assert [event["step"] for event in starts] == [0, int(before[-8:])]
    for name in complete(client, "run"):  # the damaged one was made anew
        require_whole(client, "run", name)


@pytest.mark.slow
def test_a_bucket_that_is_down_neither_stops_a_run_nor_holds_up_a_step(calm, tmp_path):
    client, proxy = calm
    down = recipe(tmp_path / "down", "down", checkpoint__keep=1)
    checkpoints = tmp_path / "down" / "checkpoints"

    def while_it_trains():
        """Nothing is answered from the first save on, until all steps were done without it."""
        wait_until(lambda: find_checkpoint(checkpoints) is not None)
        proxy.opened.clear()
        wait_until(lambda: find_checkpoint(checkpoints).name == "step_00000008")
        proxy.down = True
        proxy.opened.set()

    thread = threading.Thread(target=while_it_trains)
    thread.start()
    ((end,),) = on_ranks(train, 1, [down])
    thread.join()
    assert end.startswith("the last checkpoint cannot be mirrored: s3://bucket/down/checkpoints/")
    assert (tmp_path / "down" / "export").is_dir()
    events = lines_of(tmp_path / "down" / "events.jsonl")
    failures = [e for e in events if e.get("kind") == "mirror" and "failure" in e]
    assert failures[-1]["step"] == STEPS
    assert [p.name for p in checkpoints.iterdir() if p.is_dir()] == ["step_00000008"]  # keep=1

    proxy.down = False
    assert on_ranks(train, 2, [down]) == [[None], [None]]  # other ranks share what there is
    require_whole(client, "down", "step_00000008")
    assert content(client, "down/export/open_clip_config.json")
    assert curve(tmp_path / "down", STEPS)


@pytest.mark.slow
def test_a_bucket_that_does_not_answer_does_not_hold_up_the_end(calm, tmp_path):
    _, proxy = calm
    limits = {"engine__save_timeout_minutes": 0.1, "data__timeout_seconds": 600.0}
    silent = recipe(tmp_path / "silent", "silent", **limits)

    def fall_silent():
        wait_until(lambda: find_checkpoint(tmp_path / "silent" / "checkpoints") is not None)
        proxy.opened.clear()

    thread = threading.Thread(target=fall_silent)
    thread.start()
    ((end,),) = on_ranks(train, 1, [silent])  # the process ends though its requests do not
    thread.join()
    assert "the last checkpoint cannot be mirrored: it was not through in time" in end


def wait_until(true):
    end = time.monotonic() + 240
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def train_and_tell(rank, ranks, recipes):
    """For `on_ranks`: how recipes ended, and what this rank has copied."""
    put, get, files = MirroredRun.put, MirroredRun.get, {"put": [], "got": []}

    def counted_put(run, checkpoint, file):
        files["put"].append((checkpoint.name, file))
        put(run, checkpoint, file)

    def counted_get(run, name, file, *about):
        files["got"].append((name, file))
        get(run, name, file, *about)

    MirroredRun.put, MirroredRun.get = counted_put, counted_get
    return train(rank, ranks, recipes), files


@pytest.mark.slow
def test_two_ranks_share_what_is_copied_and_what_is_fetched(calm, tmp_path):
    client, _ = calm
    ends = {"checkpoint__every_steps": STEPS // 2}
    first, again = (recipe(tmp_path / name, "two", **ends) for name in ("first", "again"))
    told = on_ranks(train_and_tell, 2, [first])
    assert [end for end, _ in told] == [[None], [None]]
    zero, one = (set(files["put"]) for _, files in told)
    assert not zero & one
    for name in complete(client, "two"):
        require_whole(client, "two", name)
        for rank, put in enumerate((zero, one)):
            assert (name, f"state/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt") in put

    client.delete_object(Bucket=BUCKET, Key="two/checkpoints/step_00000008/manifest.json")
    told = on_ranks(train_and_tell, 2, [again])
    assert [end for end, _ in told] == [[None], [None]]
    zero, one = (set(files["got"]) for _, files in told)
    assert not zero & one and zero and one
    assert {name for name, _ in zero | one} == {"step_00000004"}
    verify_checkpoint(tmp_path / "again" / "checkpoints" / "step_00000004")
    assert curve(tmp_path / "again") == curve(tmp_path / "first")


@pytest.mark.slow
def test_a_run_that_shall_start_anew_does_not_take_a_bucket_in_use(calm, tmp_path):
    client, _ = calm
    key = "used/checkpoints/step_00000002/manifest.json"
    client.put_object(Bucket=BUCKET, Key=key, Body=b"{}")
    never = recipe(tmp_path / "run", "used", checkpoint__resume="never")
    ((end,),) = on_ranks(train, 1, [never])
    assert "s3://bucket/used holds checkpoints already; choose another checkpoint.mirror" in end


@pytest.mark.slow
def test_a_run_that_is_asked_to_leave_sees_its_last_checkpoint_into_the_mirror(tmp_path):
    run, mirror = tmp_path / "run", tmp_path / "mirror"
    job = start(run, f"checkpoint.mirror={mirror}", "train.steps=100000")
    wait_until(lambda: find_checkpoint(mirror / "checkpoints") is not None or not job.alive)
    os.kill(job.processes[1].pid, signal.SIGUSR1)
    assert job.wait() == REQUEUE, job.output[-3000:]
    newest = find_checkpoint(run / "checkpoints")
    assert find_checkpoint(mirror / "checkpoints").name == newest.name
    verify_checkpoint(mirror / "checkpoints" / newest.name)
    end = lines_of(mirror / "events.jsonl")[-1]
    assert (end["event"], end["how"], end["step"]) == ("end", "left", int(newest.name[-8:]))
    assert lines_of(mirror / "metrics.jsonl") == lines_of(run / "metrics.jsonl")
