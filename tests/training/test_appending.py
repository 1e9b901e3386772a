"""Lines of a run's files: a damaged one blocks neither a restart nor a report."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coca_scale.engine.ownership import Owner
from coca_scale.reports.page import report
from coca_scale.training.appending import append, forget_after
from coca_scale.training.log import RunLog
from tests.conftest import tiny_recipe
from tests.disks import no_file_over

NUMBERS = ("loss", "samples_per_second", "peak_memory_bytes", "global_batch", "samples_seen")
DAMAGED = [
    b"\xff\xfe garbage\n",
    b"[1]\n",
    b'{"step": null}\n',
    b'{"step": "4"}\n',
    b'{"loss": 1}\n',
    b"[" * 100_000 + b"\n",
    b'{"step": ' + b"9" * 5000 + b"}\n",
    b"\n",
]


def line(step):
    return json.dumps({"step": step, **dict.fromkeys(NUMBERS, 1)}).encode() + b"\n"


def steps_in(path):
    return [json.loads(text)["step"] for text in path.read_bytes().splitlines()]


@pytest.mark.parametrize("damaged", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_goes_and_the_others_stay(damaged, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + damaged + line(2) + line(3) + b'{"step": 2, "lo')
    note = forget_after(path, 2)
    assert steps_in(path) == [1, 2]
    assert note is not None and "1 damaged line is left out" in note


@settings(max_examples=200)
@given(st.lists(st.integers(1, 9).map(line) | st.binary(max_size=30).map(lambda b: b + b"\n")))
def test_what_stays_is_whole_and_not_of_later_steps(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    path.write_bytes(b"".join(lines))
    forget_after(path, 5)
    known = {line(step): step for step in range(1, 6)}
    assert [known[text] for text in path.read_bytes().splitlines(True)] == [
        known[text] for text in b"".join(lines).splitlines(True) if text in known
    ]


def test_nothing_is_written_anew_where_only_the_end_goes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + line(2) + line(3))
    before = path.stat().st_ino
    assert forget_after(path, 2) is None
    assert path.stat().st_ino == before, "so a full disk is no obstacle"


@pytest.mark.parametrize("damaged", [*DAMAGED, b'{"step": 1e300, "loss": {}}\n'])
def test_a_report_leaves_a_damaged_line_out_and_says_so(damaged, tmp_path):
    shutil.copy("recipes/tiny.yaml", tmp_path / "recipe.yaml")
    for name in ("metrics.jsonl", "validation.jsonl", "bad_samples.jsonl"):
        (tmp_path / name).write_bytes(line(1) + damaged + line(2) + b'{"step": 7, "loss": [1]}\n')
    assert "left out" in report([Path(tmp_path)])


def test_a_line_is_added_whole_or_not_at_all(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    append(path, line(1).decode())
    with no_file_over(path.stat().st_size + 20):
        for step in (2, 3):
            append(path, line(step).decode())
    append(path, line(4).decode())
    assert steps_in(path) == [1, 4]
    assert capsys.readouterr().err.count("metrics.jsonl is not being written") == 1


def test_a_full_disk_costs_a_run_its_logs_and_a_line_for_each(tmp_path, capsys):
    recipe = tiny_recipe(run__dir=str(tmp_path), log__tensorboard=True)
    values = dict.fromkeys(("loss", "contrastive_loss", "caption_loss", *NUMBERS), 1.0)
    with RunLog(recipe, 9, True, Owner(None, True)) as log:
        log.metrics(values | {"step": 1})
        room = max(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
        with no_file_over(room):
            for step in range(2, 100):
                log.metrics(values | {"step": step})
        log.metrics(values | {"step": 100})
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert told.count("tensorboard is not being written") == 1
    assert told.count("metrics.jsonl is not being written") == 1
    assert steps_in(tmp_path / "metrics.jsonl")[-1] == 100


def test_a_file_in_the_place_of_a_folder_costs_a_run_its_log(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("")
    recipe = tiny_recipe(run__dir=str(tmp_path), log__tensorboard=True)
    with RunLog(recipe, 9, True, Owner(None, True)):
        pass
    assert "tensorboard is not being written" in capsys.readouterr().err


def test_a_pipe_that_nobody_reads_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "metrics.jsonl")
    append(tmp_path / "metrics.jsonl", line(1).decode())
    assert "metrics.jsonl is not being written" in capsys.readouterr().err
