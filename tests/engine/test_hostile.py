"""Checkpoints that others made: nothing in them runs, whoever reads them and how."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import threading
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coca_scale.engine.checkpoint import MANIFEST, find_checkpoint, read_weights
from coca_scale.engine.zero_files import look_through
from coca_scale.engine.zero_slices import SavedState
from coca_scale.errors import UserError
from coca_scale.inference.load import load_model
from coca_scale.model.pickles import tensors_alone
from tests.conftest import tiny_recipe
from tests.ranks import on_ranks, train_all


class Evil:
    """Leaves a file where it was unpickled; one of several ways to call something."""

    def __init__(self, marker, way):
        self.marker, self.way = marker, way

    def __reduce__(self):
        touch = f"open({str(self.marker)!r}, 'w')"
        return {
            "exec": (exec, (touch,)),
            "touch": (Path.touch, (self.marker,)),
            "process": (subprocess.run, (["touch", str(self.marker)],)),
            "partial": (partial(exec, touch), ()),
        }[self.way]


WAYS = ("exec", "touch", "process", "partial")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run folder of every ZeRO stage whose files differ, two steps old."""
    folder = tmp_path_factory.mktemp("runs")
    common = {"train__steps": 2, "data__lanes": 4, "train__global_batch": 8}
    recipes = [
        tiny_recipe(run__dir=str(folder / f"stage{stage}"), engine__zero_stage=stage, **common)
        for stage in (0, 2, 3)
    ]
    on_ranks(train_all, 1, recipes)
    return folder


def poisoned(runs, stage, tmp_path, name, content):
    """A copy of a run in which a file of the checkpoint is another, and the manifest agrees."""
    folder = shutil.copytree(runs / f"stage{stage}", tmp_path / f"stage{stage}")
    checkpoint = find_checkpoint(folder / "checkpoints")
    file = next(checkpoint.glob(name))
    state = torch.load(file, weights_only=False)
    state.update(content)
    torch.save(state, file)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    entry = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    manifest["files"][str(file.relative_to(checkpoint))] = entry
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    return folder, checkpoint, file


def resumed(_rank, _ranks, recipe):
    from coca_scale.engine.launch import start_world
    from coca_scale.errors import UserError
    from coca_scale.training.trainer import Trainer

    world = start_world()
    try:
        Trainer(recipe, world).run()
    except UserError as error:
        return str(error)
    return None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "name", "way"),
    [
        (0, "state/*model_states.pt", "exec"),
        (2, "state/*model_states.pt", "touch"),
        (2, "state/*optim_states.pt", "process"),
        (3, "state/*model_states.pt", "partial"),
        (3, "state/*optim_states.pt", "exec"),
        (3, "logit_scale.pt", "touch"),
    ],
)
def test_no_reader_of_a_checkpoint_runs_what_is_in_it(runs, stage, name, way, tmp_path):
    marker = tmp_path / "ran"
    evil = {"innocent": [{"deep": (Evil(marker, way),)}]}
    folder, checkpoint, file = poisoned(runs, stage, tmp_path, name, evil)
    with pytest.raises(UserError, match="could run code") as caught:
        load_model(str(folder))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    recipe = tiny_recipe(
        run__dir=str(folder), engine__zero_stage=stage, train__steps=3,
        data__lanes=4, train__global_batch=8, checkpoint__resume=str(checkpoint),
    )  # fmt: skip
    (message,) = on_ranks(resumed, 1, recipe)
    assert "could run code" in message and str(file) in message
    if stage and name.startswith("state"):
        with pytest.raises(UserError, match="could run code"):
            SavedState(checkpoint).whole("image.projection")
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [{"optimizer_state_dict": 7}, {"optimizer_state_dict": {}}, {"optimizer_state_dict": None}],
)
def test_states_that_are_none_are_one_sentence(runs, content, tmp_path):
    _, checkpoint, _ = poisoned(runs, 2, tmp_path, "state/*optim_states.pt", content)
    with pytest.raises(UserError, match="not a state that DeepSpeed wrote") as caught:
        read_weights(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_scale_that_is_none_is_one_sentence(runs, tmp_path):
    for number, content in enumerate(
        ({"ranks": "two"}, {"zero_stage": 9}, {"model": {"log_scale": 1.0}}, {"model": {}})
    ):
        _, checkpoint, file = poisoned(runs, 3, tmp_path / str(number), "logit_scale.pt", content)
        with pytest.raises(UserError, match=str(file)):
            read_weights(checkpoint)


@pytest.mark.slow
def test_a_run_that_diverged_is_not_gone_on_from(runs, tmp_path):
    state = torch.load(next((runs / "stage2").rglob("*optim_states.pt")), weights_only=False)
    optimizer = state["optimizer_state_dict"]
    optimizer["single_partition_of_fp32_groups"][0][5] = torch.nan
    folder, checkpoint, _ = poisoned(runs, 2, tmp_path, "state/*optim_states.pt", state)
    with pytest.raises(UserError, match="weights hold NaN or infinity"):
        load_model(str(folder))
    recipe = tiny_recipe(
        run__dir=str(folder), engine__zero_stage=2, train__steps=3,
        data__lanes=4, train__global_batch=8, checkpoint__resume=str(checkpoint),
    )  # fmt: skip
    (message,) = on_ranks(resumed, 1, recipe)
    assert str(checkpoint) in message and "NaN or infinity" in message


NESTED = st.recursive(
    st.sampled_from(WAYS),
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, min_size=1, max_size=3)
        | st.tuples(inner, inner)
        | st.builds(lambda value: OrderedDict(a=value), inner)
    ),
    max_leaves=6,
)


def armed(node, marker):
    """The same containers with something evil at every leaf."""
    if isinstance(node, str):
        return Evil(marker, node)
    if isinstance(node, dict):
        return type(node)((key, armed(value, marker)) for key, value in node.items())
    return type(node)(armed(value, marker) for value in node)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(NESTED, st.booleans())
def test_evil_at_any_depth_stays_asleep(tmp_path, shape, new_format):
    marker, state = tmp_path / "ran", tmp_path / "state"
    state.mkdir(exist_ok=True)
    content = {"module": {"a": torch.ones(3)}, "more": armed(shape, marker)}
    torch.save(content, state / "x.pt", _use_new_zipfile_serialization=new_format)
    with pytest.raises(UserError, match="could run code"):
        look_through(state)
    assert not marker.exists()


def test_the_environment_cannot_open_it_and_is_left_as_it_was(tmp_path, monkeypatch):
    """People set this variable to go on with old code."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker, file = tmp_path / "ran", tmp_path / "x.pt"
    torch.save(Evil(marker, "exec"), file)
    opened, left = threading.Event(), threading.Event()

    def other_thread():
        with tensors_alone():
            opened.set()
        left.set()

    with tensors_alone():
        other = threading.Thread(target=other_thread)
        other.start()
        with pytest.raises(Exception, match="Weights only load failed"):
            torch.load(file, weights_only=False)
        assert not opened.is_set()
    other.join()
    assert left.is_set() and not marker.exists()
    assert torch.load(file, weights_only=False) is None
    assert marker.exists()
