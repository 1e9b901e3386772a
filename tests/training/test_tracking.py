"""Weights & Biases that cannot be reached, or is not installed."""

from __future__ import annotations

import sys

import pytest

from coca_scale.planning.check import tracking_fault
from coca_scale.recipe import load_recipe
from coca_scale.training.tracking import Tracker


@pytest.fixture
def recipe():
    return load_recipe("recipes/tiny.yaml", ["log.wandb=coca"])


def test_without_a_key_the_run_goes_on(recipe, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no .netrc of whoever runs the tests
    lines = []
    tracker = Tracker(recipe, tmp_path, lines.append)
    tracker.log(1, {"train/loss": 1.0})
    tracker.close()
    assert len(lines) == 1
    assert lines[0].startswith("the run goes on without Weights & Biases: No API key")


def test_a_missing_package_is_named(recipe, monkeypatch):
    assert tracking_fault(recipe) is None
    monkeypatch.setitem(sys.modules, "wandb", None)
    fault = tracking_fault(recipe)
    assert fault is not None
    assert "pip install 'coca-scale[wandb]'" in fault
    assert tracking_fault(load_recipe("recipes/tiny.yaml")) is None
