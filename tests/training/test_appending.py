"""Lines of a run's files: a damaged one blocks neither a restart nor a report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coca_scale.reports.page import report
from coca_scale.training.appending import forget_after

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
