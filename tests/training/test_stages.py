"""Stages of a recipe: what they inherit, where their data stands, what may change in them."""

from __future__ import annotations

import pytest

from coca_scale.errors import UserError
from coca_scale.model.config import parse_model_config
from coca_scale.model.weights import require_resizable
from coca_scale.recipe import BatchSplit, RecipeError
from coca_scale.recipe.stages import stage_at, stages_of
from coca_scale.training.identity import compare
from coca_scale.training.positions import Positions
from coca_scale.training.schedule import learning_rate, rate_of
from tests.conftest import tiny_recipe
from tests.training.identities import HERE, is_of
from tests.variants import raw_config

A, B = "synthetic://shapes?count=512&size=48", "synthetic://shapes?count=600&size=48"


def staged(*stages, **changes):
    return tiny_recipe(train__steps=None, schedule__stages=list(stages), **changes)


def rows(recipe):
    return stages_of(recipe, lambda: None)


def test_a_stage_has_what_it_names_and_else_what_the_recipe_has():
    one, two = rows(staged({"steps": 5, "image_size": 24, "lock_text": True}, {"samples": 100}))
    assert (one.recipe.model.image_size, one.recipe.model.lock_text) == (24, True)
    assert (two.recipe.model.image_size, two.recipe.model.lock_text) == (None, False)
    assert (one.first, one.last, two.first, two.last) == (0, 5, 5, 12)
    assert [two.samples_seen(step) for step in (5, 6, 12)] == [80, 96, 192]
    assert [stage_at([one, two], step).number for step in (0, 4, 5, 11, 12)] == [1, 1, 2, 2, 2]
    assert one.recipe.train.steps == 5 and not one.recipe.schedule.stages


@pytest.mark.parametrize(
    ("batches", "ranks", "lanes"),
    [((4096, 6144), 64, 1024), ((96, 64, 8), 8, 8), ((98304,), 64, 768)],
)
def test_all_stages_have_the_same_lanes_on_any_ranks(batches, ranks, lanes):
    stages = rows(staged(*({"steps": 1, "global_batch": n, "micro_batch": 1} for n in batches)))
    splits = [BatchSplit.from_recipe(stage.recipe, ranks) for stage in stages]
    assert {split.lanes for split in splits} == {lanes}
    assert [split.samples_per_lane * lanes for split in splits] == [*batches]


def test_a_schedule_spans_the_stages_that_name_no_peak():
    recipe = staged(
        *({"steps": 4}, {"steps": 6, "lr_factor": 0.5}, {"steps": 5, "lr": 1e-4}, {"steps": 3}),
        schedule__warmup_steps=2,
    )
    rates = [rate_of(rows(recipe), step) for step in range(18)]
    first = [learning_rate(step, 10, 1e-3, recipe.schedule) for step in range(10)]
    assert rates[:4] == first[:4] and rates[4:10] == [rate / 2 for rate in first[4:]]
    plain = recipe.schedule.model_copy(update={"warmup_steps": 0})
    assert rates[10:] == [learning_rate(step, 8, 1e-4, plain) for step in range(8)]


def test_data_goes_on_where_an_earlier_stage_left_it():
    stages = rows(
        staged(
            *({"steps": 1}, {"steps": 1, "train": B}, {"steps": 1, "train": B, "image_size": 24}),
            *({"steps": 1}, {"steps": 1, "train": A, "image_size": 40}),
            data__train=A,
        )
    )
    progress, found = {}, []
    for stage in stages:
        at = Positions.of(progress, stages, stage)
        found.append(at.lanes)
        again = {"stage": stage.number, "lanes": [[stage.number]], "left": at.left}
        assert Positions.of(again, stages, stage) == Positions([[stage.number]], at.left)
        progress = again
    assert found == [None, None, [[2]], [[1]], [[4]]]
    assert progress["left"] == {"3": [[3]]}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"image_size": 24}], r"schedule.stages.0: give exactly one of steps, samples"),
        ([{"steps": 1, "samples": 1}], r"schedule.stages.0: give exactly one of steps, samples"),
        ([{"steps": 1}, {"steps": 1, "imagesize": 3}], "did you mean schedule.stages.1.image_size"),
        ([{"steps": 1, "text_unlocked_groups": 1}], "schedule.stages.0: text_unlocked_groups"),
        ([{"steps": 1}, {"steps": 1, "warmup_steps": 1}], "schedule.stages.1: warmup_steps needs"),
        ([{"steps": 1}, {"steps": 1, "lr": 1.0, "lr_factor": 2.0}], "lr or lr_factor, not both"),
    ],
)
def test_what_is_no_stage_is_refused(stages, message):
    with pytest.raises(RecipeError, match=message):
        staged(*stages)


def test_the_length_of_the_run_is_that_of_its_stages():
    with pytest.raises(RecipeError, match=r"train.steps: the length of this run is that of its"):
        tiny_recipe(schedule__stages=[{"steps": 1}])
    with pytest.raises(RecipeError, match=r"schedule.stages needs engine.zero_stage 1, 2 or 3"):
        staged({"steps": 1}, engine__zero_stage=0)
    with pytest.raises(UserError, match="at most 99,999,999 can be counted"):
        rows(staged({"steps": 99_999_999}, {"steps": 1}))


FIRST, SECOND = {"steps": 5, "image_size": 24}, {"steps": 5, "image_size": 36}
THIRD = {"steps": 5, "lr_factor": 0.1}


def resume(before, after, stage, step):
    saved, now = is_of(before, stage=stage, step=step)[0], is_of(after, stage=stage)[1]
    return compare(HERE, saved, *now)


@pytest.mark.parametrize(
    "first",
    [
        *({**FIRST, "steps": 6}, {**FIRST, "image_size": 32}, {**FIRST, "lr_factor": 0.5}),
        *({**FIRST, "global_batch": 32}, {"samples": 80, "image_size": 24}),
    ],
)
def test_a_finished_stage_stays_as_it_was(first):
    with pytest.raises(UserError, match=r"schedule.stages.0.* of a stage that is finished"):
        resume(staged(FIRST, SECOND, THIRD), staged(first, SECOND, THIRD), 2, 8)


@pytest.mark.parametrize(
    "after",
    [
        (FIRST, SECOND, {"steps": 50, "image_size": 40, "lr": 1e-4}),
        (FIRST, SECOND),
        (FIRST, {**SECOND, "steps": 3}, THIRD),
        (FIRST, {**SECOND, "lr_factor": 0.5, "patch_dropout": 0.5}, THIRD),
        ({**FIRST, "micro_batch": 4}, SECOND, THIRD),
    ],
)
def test_stages_that_are_not_finished_may_change(after):
    notes = resume(staged(FIRST, SECOND, THIRD), staged(*after), 2, 8)
    assert len(notes) == 1 and "schedule.stages" in notes[0]


def test_a_stage_cannot_be_shorter_than_it_is():
    with pytest.raises(UserError, match="stage 2 of 3 is of steps 5 to 7, and it has 8"):
        resume(staged(FIRST, SECOND, THIRD), staged(FIRST, {**SECOND, "steps": 2}, THIRD), 2, 8)


def test_what_is_fixed_in_a_run_is_fixed_in_the_stage_that_goes_on():
    changed = staged(FIRST, {**SECOND, "image_size": 40, "caption_weight": 1.0}, THIRD)
    with pytest.raises(UserError, match=r"image_size 36 → 40; loss.caption_weight 2.0 → 1.0"):
        resume(staged(FIRST, SECOND, THIRD), changed, 2, 8)


def test_a_finished_run_may_get_another_stage():
    plain = tiny_recipe(train__steps=8, model__image_size=24)
    longer = staged({"steps": 8, "image_size": 24}, {"steps": 4, "image_size": 48})
    (note,) = resume(plain, longer, 1, 8)
    assert "train.steps" not in note and "schedule.stages" in note


@pytest.mark.parametrize("tower", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_what_cannot_be_resized_is_told_before_a_run_begins(tower):
    pooler = {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 17}
    raw = raw_config("coca_tiny")
    raw["vision_cfg"] = {"image_size": 64, "timm_model_name": tower, **pooler}
    small = parse_model_config(raw, tower)
    large = small.resized(image_size=96)
    if tower.startswith("vit"):
        require_resizable(small, large)
    else:
        with pytest.raises(UserError, match="relative_position_bias_table has shape"):
            require_resizable(small, large)
