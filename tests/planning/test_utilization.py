"""Model FLOPs utilization in the metrics of a run."""

from __future__ import annotations

import pytest

from coca_scale.planning.costs import model_flops
from coca_scale.recipe import BatchSplit
from tests.conftest import tiny_recipe
from tests.json_lines import lines_of
from tests.ranks import on_ranks

PEAK = 1e12


def recipe_of(folder, **changes):
    return tiny_recipe(
        run__dir=str(folder), train__steps=2, checkpoint__every_steps=None, **changes
    )


def train(_rank, _ranks, folder):
    """A run on a device whose FLOPs are known."""
    from coca_scale.training import setup
    from coca_scale.training.run import train_recipe

    setup.peak_flops = lambda name: PEAK
    train_recipe(recipe_of(folder))


@pytest.mark.slow
def test_a_known_device_has_its_utilization_in_the_metrics(tmp_path):
    on_ranks(train, 1, tmp_path / "run")
    recipe = recipe_of(tmp_path)
    flops = model_flops(recipe, BatchSplit.from_recipe(recipe, 1))
    for line in lines_of(tmp_path / "run" / "metrics.jsonl"):
        assert line["mfu"] == pytest.approx(line["samples_per_second_per_rank"] * flops / PEAK)


def test_what_is_computed_twice_does_not_count(tmp_path):
    found = []
    for mode in ("none", "selective", "full"):
        recipe = recipe_of(tmp_path, engine__activation_checkpointing=mode)
        found.append(model_flops(recipe, BatchSplit.from_recipe(recipe, 1)))
    assert found[0] == found[1] == found[2] > 1e6


def test_patches_that_are_dropped_do_not_count(tmp_path):
    found = []
    for dropped in (0.0, 0.5):
        recipe = recipe_of(tmp_path, model__patch_dropout=dropped)
        found.append(model_flops(recipe, BatchSplit.from_recipe(recipe, 1)))
    # of 36 patches, which are most of an image tower that is more than half of the whole
    assert 0.6 < found[1] / found[0] < 0.8
