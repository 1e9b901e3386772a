"""`coca-scale watch`: a run that trains, is killed, comes back and finishes; files of any kind."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coca_scale.recipe import dump_recipe
from coca_scale.recipe.lock import WATCH_SECONDS
from coca_scale.reports.run_files import LAST_BYTES, Pulse, iso
from coca_scale.reports.watch_page import Screen, page_of_many, page_of_one, speaks_unicode
from coca_scale.reports.watch_state import RunState, Save, Start, Waiting, read_state
from tests.conftest import tiny_recipe
from tests.invoke import mistake_in, output_of
from tests.json_lines import lines_of
from tests.ranks import TrainingRanks, on_ranks, train_all

NOW = 1_800_000_000.0
SMALL = ("recipe.yaml", "metrics.jsonl", "events.jsonl", "validation.jsonl", "lock")
UTF8 = {"LC_ALL": "C.UTF-8"}


def state_of(folder, now=NOW):
    return read_state(folder, Pulse(folder), now, time.monotonic())


def page(state, width=80, unicode=False, now=NOW):
    return [line.plain for line in page_of_one(state, Screen(width, unicode, now))]


def row(states, width=80):
    return [line.plain for line in page_of_many(states, Screen(width, False, NOW))]


def write_run(folder, recipe=None, **files):
    """A run folder of lines."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe or tiny_recipe(train__steps=100)))
    for name, lines in files.items():
        content = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(content)
    return folder


def metrics(steps, first=0.0, seconds=2.0, **values):
    """Lines of metrics.jsonl that are written every `seconds`, a step each."""
    common = {"global_batch": 16, "samples_per_second": 16 / seconds, "loss": 2.0, **values}
    times = [iso(NOW + first + seconds * number) for number in range(len(steps))]
    return [{"step": s, "time": at, **common} for s, at in zip(steps, times, strict=True)]


def event(name, at, step=0, **values):
    return {"time": iso(NOW + at), "event": name, "step": step, **values}


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """A run and what was seen of it: training, killed, started again, finished."""
    base = tmp_path_factory.mktemp("watched")
    folder, recipe = base / "run", base / "recipe.yaml"
    changes = {"run__dir": str(folder), "checkpoint__every_steps": 10}
    text = dump_recipe(tiny_recipe(**changes, train__steps=4000, schedule__name="constant"))
    recipe.write_text(text)
    job = TrainingRanks(base / "log", "--recipe", str(recipe), ranks=1)
    while not reached(folder, 14):
        assert job.alive, job.output
        time.sleep(0.1)
    training = json.loads(output_of("watch", "--json", folder))
    shown = output_of("watch", folder)
    job.kill()
    killed = json.loads(output_of("watch", "--json", folder))
    last = killed["step"] + 2
    changed = tiny_recipe(**changes, train__steps=last, schedule__name="constant")
    on_ranks(train_all, 1, [changed])
    finished = json.loads(output_of("watch", "--json", folder))
    return SimpleNamespace(
        folder=folder, training=training, shown=shown, killed=killed, finished=finished, last=last
    )


def reached(folder, step):
    file = folder / "metrics.jsonl"
    return file.exists() and any(line["step"] >= step for line in lines_of(file))


@pytest.mark.slow
def test_a_run_that_trains_says_how_far_it_is_and_what_it_waits_for(history):
    found = history.training
    assert found["state"] == "running" and found["about"] == ""
    assert 14 <= found["step"] < 4000 and found["last_step"] == 4000
    left = (4000 - found["step"]) * found["seconds_per_step"]
    assert found["seconds_left"] == pytest.approx(left)
    assert found["losses"].keys() == {"loss", "contrastive_loss", "caption_loss"}
    assert found["curves"]["loss"][0] > found["curves"]["loss"][-1]
    (save,) = found["saves"]
    assert save["kind"] == "shared" and save["step"] == 10 and save["bytes"] > 1e6
    assert found["checkpoint"] == "step_00000010"
    waiting = found["waiting"]
    assert all(0 <= waiting[name] <= 1 for name in ("data", "data_worst_rank", "others", "saves"))
    assert waiting["restarts"] == 0
    assert [start["why"] for start in found["starts"]] == [None]
    assert found["slowest_rank"] is None  # of one rank


@pytest.mark.slow
def test_the_keys_of_the_json_are_those_that_are_documented(history):
    for found in (history.training, history.killed, history.finished):
        assert list(found) == [field.name for field in fields(RunState)]
    for name in history.training:
        assert f"        {name}: " in RunState.__doc__, name


def test_the_docs_name_the_keys_of_the_json():
    text = Path("docs/surviving.md").read_text()
    listed = text[text.index("`--json` has ") : text.index("A run is")]
    names = [f.name for cls in (RunState, Waiting, Save, Start) for f in fields(cls)]
    assert re.findall(r"`(\w+)`", listed) == names


@pytest.mark.slow
def test_a_page_that_is_piped_is_printed_once_and_fits_a_terminal(history):
    assert "running" in history.shown and "of 4,000" in history.shown
    assert max(map(len, history.shown.splitlines())) <= 80
    assert "\x1b" not in history.shown


@pytest.mark.slow
def test_a_run_that_was_killed_is_lost_at_once_where_it_ran(history):
    assert history.killed["state"] == "lost"
    assert "no sign of life of process" in history.killed["about"]


@pytest.mark.slow
def test_a_start_that_came_again_is_told_with_what_it_cost(history):
    found = history.finished
    assert found["state"] == "finished" and found["step"] == found["last_step"] == history.last
    first, second = found["starts"]
    assert first["why"] is None
    assert second["why"] == "the start before ended without a word"
    assert second["repeated_steps"] == history.killed["step"] - second["step"] > 0
    assert second["lost_seconds"] > 0
    assert found["lost_seconds"] > second["lost_seconds"]  # and the steps
    text = "\n".join(page(state_of(history.folder)))
    assert f"{second['repeated_steps']} steps run again" in text
    assert f"at step {second['step']}: the start before ended without a word" in text


@pytest.mark.slow
def test_several_runs_have_a_row_each_and_json_a_line_each(history, tmp_path):
    other = write_run(tmp_path / "a run with a name that is long enough\x1b[2J")
    lines = output_of("watch", history.folder, other).splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["run", "run", "a"]
    assert "finished" in lines[1] and "empty" in lines[2]
    assert max(map(len, lines)) <= 80
    found = map(json.loads, output_of("watch", "--json", history.folder, other).splitlines())
    assert [state["run"] for state in found] == ["run", other.name]


@pytest.mark.slow
def test_live_until_ctrl_c_in_a_terminal_that_knows_no_unicode(history):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "coca_scale", "watch", str(history.folder), "--every", "0.2"]
    environ = {k: v for k, v in os.environ.items() if k not in ("LC_ALL", "LC_CTYPE", "COLUMNS")}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**environ, "LANG": "C"}
    )
    os.close(theirs)
    shown = b""
    while shown.count(b"finished") < 3:  # it is drawn again and again
        shown += os.read(ours, 4096)
    process.send_signal(signal.SIGINT)
    with pytest.raises(OSError):  # a terminal that nobody has open any more
        while True:
            shown += os.read(ours, 4096)
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode("ascii")
    assert "Abort" not in text and "Traceback" not in text
    _, _, left_behind = text.rpartition("\x1b[?1049l")  # after the screen of its own
    assert "finished" in left_behind and "starts" in left_behind


def test_only_a_run_folder_is_watched(tmp_path):
    assert "is no run: it has no recipe.yaml" in mistake_in("watch", tmp_path)


def test_only_the_end_of_long_files_is_read(tmp_path):
    lines = metrics(range(1, 100_001), note="x" * 60)
    run = write_run(tmp_path / "run", metrics=lines)
    assert (run / "metrics.jsonl").stat().st_size > 10 * LAST_BYTES
    found = state_of(run, NOW + 200_000)
    assert found.step == 100_000 and found.damaged_lines == 0
    assert found.seconds_per_step == pytest.approx(2.0)
    assert 20 <= len(found.curves["loss"]) <= 40


def alive(folder, now):
    """A lock file as a process of another machine leaves it, that showed life at `now`."""
    (folder / "lock").mkdir(exist_ok=True)
    holder = {"host": "n1", "boot": "b", "processes": "p", "pid": 7, "started": 1, "job": None}
    file = folder / "lock" / "1.json"
    file.write_text(json.dumps({**holder, "restart": 0, "since": "then"}))
    os.utime(file, (now, now))


def test_a_run_stalls_when_no_line_comes_for_long(tmp_path):
    lines = metrics(range(1, 11), seconds=60.0)
    run = write_run(tmp_path / "run", metrics=lines, events=[event("start", -5)])
    at = NOW + 9 * 60
    for silence, state in ((200, "running"), (400, "stalled")):
        alive(run, at + silence)
        found = state_of(run, at + silence)
        assert found.state == state
    assert found.about == "no new line, which usually takes 60 s"
    assert found.since == iso(at)
    assert page(found, now=at + 400)[0] == (
        "run  stalled: no new line, which usually takes 60 s, 6 min ago"
    )


def test_life_is_a_lock_file_that_changes_whatever_the_clocks_say(tmp_path):
    run, pulse = write_run(tmp_path / "run", metrics=metrics([1])), None
    alive(run, NOW - 1000)  # a server whose clock is behind, or an owner that is gone
    pulse = Pulse(run)
    assert pulse.look(NOW, 50.0)[1] is False
    alive(run, NOW - 995)
    assert pulse.look(NOW + 5, 55.0)[1] is True
    assert pulse.look(NOW + 50, 55.0 + WATCH_SECONDS - 1)[1] is True
    assert pulse.look(NOW + 70, 55.0 + WATCH_SECONDS + 1)[1] is False


ENDS = [
    ([event("end", 9, 3, how="left")], "left", "to be started again"),
    ([event("end", 9, 3, how="stopped")], "stopped", "asked"),
    ([event("end", 9, 3, how="finished")], "finished", ""),
    (
        [{"time": iso(NOW), "event": "failure", "rank": 13, "host": "n2", "what": "ran out"}],
        "failed",
        "rank 13 on n2: ran out",
    ),
    ([], "lost", "nobody trains it"),
]


@pytest.mark.parametrize(("events", "state", "about"), ENDS, ids=[end[1] for end in ENDS])
def test_a_run_says_how_it_ended(tmp_path, events, state, about):
    begun = [event("start", 0, last_step=100)]
    found = state_of(write_run(tmp_path / "r", metrics=metrics([1, 2]), events=begun + events))
    assert found.state == state
    assert about in found.about
    assert state in row([found])[1]


@pytest.mark.parametrize(("end", "later"), [("end", 2), ("failure", WATCH_SECONDS + 2)])
def test_a_run_that_is_taken_again_starts_long_before_its_start_is_told(tmp_path, end, later):
    ends = event(end, 9, 3, how="left", what="rank 0 is dead")
    run = write_run(tmp_path / "run", metrics=metrics([1, 2]), events=[event("start", 0), ends])
    found = state_of(run, NOW + 9)
    assert found.state == ("left" if end == "end" else "failed")
    alive(run, NOW + 10)  # the ranks that died had it until then
    assert state_of(run, NOW + 11).state == ("starting" if end == "end" else "failed")
    alive(run, NOW + 9 + later)
    assert state_of(run, NOW + 10 + later).state == "starting"


def test_starts_have_their_reasons(tmp_path):
    before = {"step": 30, "time": iso(NOW + 40)}
    events = [
        event("start", 0, hosts={"n1": 8}, stage=1),
        event("start", 10, 20, stage=2),
        event("end", 40, 30, how="left"),
        event("start", 100, 30, stage=2, job="815", restart=1, launch=2, before=before),
        event("failure", 120, rank=None, host="n1", what="rank 3 on n1 is dead"),
        event("start", 200, 25, stage=2, why="a rank died", before={**before, "step": 31}),
        event("start", 210, 25, stage=2, why="left n1, which SLURM drains", before=before),
        event("start", 220, 25, stage=2, going_back=True, before=before),
        event("save", 230, 25, kind="shared", bytes=10**9, seconds=3.0, blocked_seconds=0.5),
        event("save", 240, 35, kind="shared", failure="Stale file handle"),
        event("save", 250, 45, kind="shared", failure="No space left on device"),
    ]
    found = state_of(write_run(tmp_path / "run", events=events))
    assert [start.why for start in found.starts] == [
        *(None, None, "asked to leave", "rank 3 on n1 is dead"),
        *("left n1, which SLURM drains", "back behind steps that went wrong"),
    ]
    assert [start.lost_seconds for start in found.starts] == [0, 0, 60, 160, 170, 180]
    assert [start.repeated_steps for start in found.starts] == [0, 0, 0, 6, 5, 5]
    assert (found.starts[2].job, found.starts[2].restart) == ("815", 1)
    again = state_of(write_run(tmp_path / "again", events=events[:4]))
    assert "at step 30, job 815 start 1.2: asked to leave" in "\n".join(page(again))
    assert [(s.kind, s.step, s.failures) for s in found.saves] == [("shared", 25, 2)]
    text = "\n".join(page(found, now=NOW + 260))
    assert "step 25, 30 s ago: 1.00 GB in 3.0 s, training waited 0.5 s" in text
    assert "failed since: 2 times, No space left on device" in text


def test_each_kind_of_save_has_a_line_and_all_cost_time(tmp_path):
    cost = {"bytes": 2 * 10**9, "seconds": 2.0, "blocked_seconds": 0.5}
    events = [
        event("start", -1),
        event("save", 10, 5, kind="shared", **cost),
        event("save", 12, 8, kind="local", saves=4, **cost),  # each of them
        event("save", 14, 5, kind="mirror", bytes=2 * 10**9, seconds=30.0),
    ]
    lines = metrics(range(1, 11), seconds=2.5)
    found = state_of(write_run(tmp_path / "run", metrics=lines, events=events))
    assert found.waiting.saves == pytest.approx(5 * 0.5 / 22.5)
    text = [line[12:] for line in page(found, now=NOW + 24)][-4:-1]
    assert text == [
        "step 5, 14 s ago: 2.00 GB in 2.0 s, training waited 0.5 s",
        "local: step 8, 12 s ago: 2.00 GB in 2.0 s, training waited 0.5 s",
        "mirror: step 5, 10 s ago: 2.00 GB in 30.0 s",
    ]


def test_what_files_say_steers_no_terminal(tmp_path):
    evil = "\x1b]0;owned\x07[red]\nnext \udcff ünï"
    failed = [event("start", 0), event("failure", 9, rank=0, host="n\x9b1", what=evil)]
    run = write_run(tmp_path / "run", metrics=metrics([1], **{"e\x1bvil_loss": 1.0}), events=failed)
    found = state_of(run)
    for unicode in (True, False):
        text = "".join(page(found, 300, unicode) + row([found], 300))
        assert not set(text) & {"\x1b", "\x07", "\x9b", "\n"}
        assert "\\x1b]0;owned\\x07[red] next \\udcff" in text
        assert text.isascii() != unicode


def test_what_is_not_a_file_is_left_alone(tmp_path):
    run = write_run(tmp_path / "run")
    os.mkfifo(run / "metrics.jsonl")
    (run / "events.jsonl").mkdir()
    (run / "checkpoints").touch()
    (run / "lock").symlink_to(tmp_path / "nowhere")
    assert state_of(run).state == "empty"


@pytest.mark.parametrize(
    ("environ", "known"),
    [
        *(({}, False), ({"LANG": "C"}, False), ({"LANG": "de_DE.utf8"}, True)),
        ({"LANG": "C", "LC_CTYPE": "C.UTF-8"}, False),  # as Python sets it
        ({"LANG": "en_US.UTF-8", "LC_ALL": "POSIX"}, False),
    ],
)
def test_the_locale_says_what_a_terminal_shows(environ, known):
    assert speaks_unicode(SimpleNamespace(encoding="utf-8"), environ) is known
    assert speaks_unicode(SimpleNamespace(encoding="ascii"), environ) is False


NUMBERS = st.one_of(
    st.integers(-5, 200), st.floats(), st.sampled_from([0, 1e-320, 1e299, 1e308, 10**400])
)
TIMES = st.one_of(
    st.floats(0, 4e9).map(iso),
    st.sampled_from(["x", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026-01-01"]),
)
VALUES = st.one_of(
    NUMBERS, TIMES, st.none(), st.booleans(), st.text(max_size=5), st.just({"step": 10**400})
)
NAMES = (
    *("loss", "a_loss", "global_batch", "samples_per_second", "mfu", "data_wait_fraction"),
    *("data_wait_fraction_max", "straggler_seconds", "slowest_rank", "slowest_host", "stage"),
    *("compute_slowest_rank", "compute_slowdown", "peak_memory_bytes", "bad_samples", "before"),
    *("skipped_steps", "why", "how", "what", "rank", "host", "job", "restart", "last_step"),
    *("bytes", "seconds", "blocked_seconds", "kind", "failure", "going_back", "time"),
)
LINES = st.lists(
    st.builds(
        lambda step, time, event, line: {"step": step, "time": time, "event": event, **line},
        st.integers(-1, 150),
        TIMES,
        st.sampled_from(["start", "save", "failure", "end", "other"]),
        st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=12),
    ),
    max_size=8,
)


@settings(max_examples=80, deadline=None)
@given(LINES, LINES, LINES, LINES)
def test_any_lines_give_a_page_and_json(tmp_path_factory, lines, events, validation, bad):
    folder = tmp_path_factory.getbasetemp() / "any_watched"
    files = {"metrics": lines, "events": events, "validation": validation, "bad_steps": bad}
    found = state_of(write_run(folder, **files))
    json.loads(json.dumps(found.json(), allow_nan=False))
    for unicode in (True, False):
        assert max(map(len, page(found, 80, unicode))) <= 80
    assert max(map(len, row([found, found]))) <= 80


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damaged_files_of_a_real_run_give_a_page(history, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged_watched"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in SMALL[:3]:
        content = bytearray((history.folder / name).read_bytes())
        for _ in range(data.draw(st.integers(0, 4))):
            at = data.draw(st.integers(0, len(content) - 1))
            content[at] = data.draw(st.sampled_from(list(b'\0\n"}{9\xff')))
        end = data.draw(st.one_of(st.none(), st.integers(0, len(content))))
        (folder / name).write_bytes(content[:end])
    found = state_of(folder)
    json.dumps(found.json(), allow_nan=False)
    assert page(found)
