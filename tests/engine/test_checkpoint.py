"""What a checkpoint says of itself: believed where it makes sense, else it is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coca_scale.engine.checkpoint import (
    MANIFEST,
    PROGRESS,
    newest_intact,
    read_progress,
    verify_checkpoint,
)
from coca_scale.engine.scale_file import SCALE_FILE
from coca_scale.engine.world import World
from coca_scale.engine.writing import write_hashed
from coca_scale.errors import UserError

LOOP = {
    "step": 4,
    "samples_seen": 64,
    "bad_steps": {"skipped": 0, "spikes": 0, "spread": [4, 2.5, 0.1]},
    "skips": {"bad": 1, "filtered": 0, "causes": {"broken_image": 1}, "listed": 1},
    "lanes": [[0, 0, 0, 0, 16], [0, 0, 0, 0, 15]],
    "model_cfg": {"embed_dim": 8},
    "identity": {"recipe": {}, "ranks": 2, "tokenizer": "a", "data": "b", "samples": None},
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
DEEP = "[" * 100_000


def checkpoint(folder: Path, progress: str | None = None) -> Path:
    """A complete checkpoint of a loop and a small file."""
    folder.mkdir(parents=True)
    text = (json.dumps(LOOP) if progress is None else progress).encode()
    files = {
        PROGRESS: write_hashed(folder / PROGRESS, lambda file: file.write(text)),
        SCALE_FILE: write_hashed(folder / SCALE_FILE, lambda file: torch.save({}, file)),
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}))
    return folder


def with_manifest(folder: Path, change) -> None:
    """Change what the manifest says."""
    manifest = json.loads((folder / MANIFEST).read_text())
    changed = change(manifest)
    text = changed if isinstance(changed, str) else json.dumps(changed)
    (folder / MANIFEST).write_text(text)


def entry(**changes):
    """Change the entry of the progress."""

    def change(manifest):
        manifest["files"][PROGRESS] |= changes
        return manifest

    return change


def named(name):
    """Call the progress something else."""

    def change(manifest):
        manifest["files"][name] = manifest["files"][PROGRESS]
        return manifest

    return change


MANIFESTS = [
    *(lambda _, text=text: text for text in ("null", "[]", "7", "{}", DEEP, "{", "")),
    *(lambda _, files=files: {"files": files} for files in (None, [], {}, "x", 1e300)),
    *(entry(bytes=size) for size in (None, "many", -1, 1e300, [], 10**30, 3.5)),
    *(entry(sha256=digest) for digest in (None, 5, "", "Z" * 64, ["a"])),
    *(named(name) for name in ("../../../etc/hostname", "/etc/hostname", "state/../../x")),
]
LOOPS = [
    *("null", "[]", "7", "{}", DEEP, '"step"'),
    *(
        json.dumps(LOOP | change)
        for change in (
            *({"step": value} for value in (None, "4x", 1e300, [], -1, 10**9)),
            *({"lanes": value} for value in (None, {}, [], [None], [["a"]], [[1e300]], [[-1]])),
            *({"bad_steps": value} for value in (None, [], {"spread": 1}, {"skipped": {}})),
            *(
                {"bad_steps": LOOP["bad_steps"] | {"spread": [4, mean, variance]}}
                for mean, variance in ((0.5, -1.0), (float("nan"), 1.0), (0.5, float("inf")))
            ),
            *(
                {"skips": value}
                for value in (None, [], {"causes": []}, LOOP["skips"] | {"bad": "x"})
            ),
            *({"model_cfg": value} for value in (None, [], "coca", 1e300)),
            *({"identity": value} for value in ([], 1, {"recipe": []}, {"recipe": {}})),
        )
    ),
]


def test_a_sound_checkpoint_passes(tmp_path):
    folder = checkpoint(tmp_path / "step_00000004")
    verify_checkpoint(folder)
    assert json.loads(json.dumps(read_progress(folder))) == LOOP
    old = {key: value for key, value in LOOP.items() if key != "identity"}
    assert "identity" not in read_progress(checkpoint(tmp_path / "old", json.dumps(old)))


@pytest.mark.parametrize("change", MANIFESTS)
def test_a_manifest_that_makes_no_sense_is_damage(change, tmp_path):
    older = checkpoint(tmp_path / "step_00000002")
    with_manifest(checkpoint(tmp_path / "step_00000004"), change)
    goes_back_to(older)


@pytest.mark.parametrize("progress", LOOPS)
def test_progress_that_makes_no_sense_is_damage(progress, tmp_path):
    older = checkpoint(tmp_path / "step_00000002")
    checkpoint(tmp_path / "step_00000004", progress)
    goes_back_to(older)


def goes_back_to(older: Path) -> None:
    notes: list[str] = []
    assert newest_intact(older.parent, World.alone(torch.device("cpu")), notes) == older
    (note,) = notes
    assert "step_00000004" in note and "going back to an older checkpoint" in note
    assert "\n" not in note and len(note) < 600
    names = {path.name for path in older.parent.iterdir()}
    assert names == {"step_00000002", "step_00000004.damaged"}


@settings(max_examples=200, deadline=None)
@given(JSON, st.sampled_from([(), ("files",), ("files", PROGRESS), ("files", PROGRESS, "bytes")]))
def test_whatever_is_in_a_manifest_is_one_sentence(tmp_path_factory, content, place):
    folder = checkpoint(tmp_path_factory.mktemp("c") / "step_00000004")

    def change(manifest):
        if not place:
            return content
        node = manifest
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = content
        return manifest

    with_manifest(folder, change)
    refused_in_a_sentence(folder)


@settings(max_examples=200, deadline=None)
@given(JSON, st.sampled_from([None, *LOOP]))
def test_whatever_is_in_progress_is_one_sentence(tmp_path_factory, content, key):
    progress = content if key is None else LOOP | {key: content}
    folder = checkpoint(tmp_path_factory.mktemp("c") / "step_00000004", json.dumps(progress))
    refused_in_a_sentence(folder)


def refused_in_a_sentence(folder: Path) -> None:
    try:
        verify_checkpoint(folder)
    except UserError as error:
        assert str(folder) in str(error)
