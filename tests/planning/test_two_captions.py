"""What two captions per picture cost, and what of them a recipe may ask of which model."""

from __future__ import annotations

import pytest

from coca_scale.errors import UserError
from coca_scale.planning.check import check
from coca_scale.planning.costs import count_costs
from coca_scale.recipe import BatchSplit
from tests.conftest import tiny_recipe
from tests.ranks import on_ranks

APART = {"data__caption_captions": {"long": 1.0}, "data__mean_tokens": 6.0}
LONG = {"data__caption_mean_tokens": 14.0}


def costs_of(**changes):
    recipe = tiny_recipe(engine__activation_checkpointing="none", **changes)
    return count_costs(recipe, BatchSplit.from_recipe(recipe, 1), varlen=True)


def test_a_step_costs_what_is_written_and_a_first_pass_does_not():
    one, long = (costs_of(data__mean_tokens=mean) for mean in (6.0, 14.0))
    two = costs_of(**APART, **LONG)
    parallel = costs_of(data__mean_tokens=6.0, loss__caption_parallel=0.5)
    assert two.tower_flops == parallel.tower_flops == one.tower_flops < long.tower_flops
    assert one.step_flops < parallel.step_flops < two.step_flops
    # beside one long caption for both there are the rows of the short one alone
    more = one.tower_flops - costs_of(data__mean_tokens=2.0).tower_flops
    assert long.step_flops < two.step_flops < long.step_flops + 6 * more
    idle = costs_of(**APART, **LONG, loss__contrastive_weight=0.0)
    assert idle.tower_flops == long.tower_flops


@pytest.mark.parametrize("model", ["coca_tiny", "mammut2_tiny", "coca2-moderntext_tiny"])
def test_every_unit_costs_something_and_all_of_them_a_step(model):
    for apart in ({}, {**APART, **LONG, "loss__caption_parallel": 0.5}):
        costs = costs_of(model__name=model, **apart)
        flops = [(u.forward_flops, u.backward_flops) for u in costs.units]
        assert min(min(pair) for pair in flops) >= 0
        assert sum(map(sum, flops)) == pytest.approx(costs.step_flops)
        again = [u for u in costs.units if u.part == "decoder" and u.elements and not u.trained]
        # the blocks of a MaMMUT, which are the text tower's
        assert len(again) == (4 if model == "mammut2_tiny" else 0)
        reduced = sum(u.trained for u in costs.units)
        assert reduced == costs.trained


def refusal_on_rank(_rank, _ranks, recipes):
    from coca_scale.engine.launch import end_world, start_world
    from coca_scale.training.setup import Preparation

    world, found = start_world(60), []
    for recipe in recipes:
        try:
            Preparation(recipe, world, None)
            found.append(None)
        except UserError as error:
            found.append(str(error))
    end_world()
    return found


def test_a_clip_writes_no_captions():
    clip = {"model__name": "clip_tiny", "data__val": None}
    recipes = [
        tiny_recipe(**clip, data__caption_captions={"long": 1.0}),
        tiny_recipe(**clip, loss__caption_parallel=0.5),
        tiny_recipe(**clip, data__contrastive_captions={"long:sentences": 1.0}),
    ]
    wanted = [
        "data.caption_captions is for models that write captions, and clip_tiny is a CLIP",
        "loss.caption_parallel is for models that write captions, and clip_tiny is a CLIP",
        None,
    ]
    assert on_ranks(refusal_on_rank, 1, recipes)[0] == wanted
    for recipe, message in zip(recipes, wanted, strict=True):
        assert check(recipe, 1).faults == ([] if message is None else [f"model: {message}"])


def test_captions_to_write_that_are_cut_are_counted():
    recipe = tiny_recipe(data__caption_captions={"long": 1.0})
    notes = check(recipe, 1).notes
    assert any("64 of the first 128 captions have more tokens than the context" in n for n in notes)
