"""Length of a run and its learning rates."""

import json

import pytest

from coca_scale.errors import UserError
from coca_scale.recipe import RecipeError, dump_recipe, recipe_from_dict
from coca_scale.recipe.load import apply_override
from coca_scale.recipe.loss_weights import weight_at
from coca_scale.recipe.public import public_recipe
from coca_scale.recipe.schema import ScheduleSection, TrainSection
from coca_scale.recipe.stages import stages_of
from coca_scale.recipe.total_steps import total_steps
from coca_scale.recipe.yaml_text import parse_yaml
from coca_scale.training.schedule import learning_rate, loss_weights_of, weights_move
from tests.conftest import tiny_recipe


def rates(steps, **schedule):
    return [learning_rate(s, steps, 1.0, ScheduleSection(**schedule)) for s in range(steps)]


def test_cosine_warms_up_and_ends_near_zero():
    curve = rates(100, name="cosine", warmup_steps=10)
    assert curve[0] == pytest.approx(0.1)
    assert curve[9] == curve[10] == 1.0
    assert curve[55] == pytest.approx(0.5)
    assert 0 < curve[99] < 1e-3
    assert curve[10:] == sorted(curve[10:], reverse=True)


def test_constant_and_cooldown():
    assert set(rates(10, name="constant")) == {1.0}
    curve = rates(10, name="constant-cooldown", cooldown_steps=4)
    assert curve[:7] == [1.0] * 7
    assert curve[7:] == [0.75, 0.5, 0.25]


def test_warmup_is_cut_to_the_run():
    assert rates(4, warmup_steps=1000) == [0.25, 0.5, 0.75, 1.0]


def weights(text, steps):
    section = tiny_recipe(loss__caption_weight=parse_yaml(text)).loss
    return [weight_at(section.weight("caption"), step, steps) for step in range(steps)]


def test_weights_of_losses_are_numbers_or_points():
    assert weights("3", 4) == [3.0] * 4
    assert weights("{0: 0, 4: 2}", 6) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert weights("{4: 2, 2: 1}", 6) == [1.0, 1.0, 1.0, 1.5, 2.0, 2.0]  # in any order
    assert weights("{0%: 1, 50%: 0, 100%: 1}", 4) == [1.0, 0.5, 0.0, 0.5]
    assert weights("{0: 1, 12.5%: 0}", 8) == [1.0] + [0.0] * 7
    assert weights("{0: 0.1, 7: 0.1, 9: 0.1}", 12) == [0.1] * 12  # to the bit
    recipe = tiny_recipe(loss__caption_weight={0: 0.0, 1_000: 2})
    again = recipe_from_dict(parse_yaml(dump_recipe(recipe)))
    assert again == recipe == recipe_from_dict(json.loads(recipe.model_dump_json()))
    raw = {"loss": {}}
    apply_override(raw, "loss.caption_weight={0: 0.0, 1000: 2}")
    assert tiny_recipe(**{f"loss__{k}": v for k, v in raw["loss"].items()}) == recipe
    assert public_recipe(recipe.model_dump())["loss"] == recipe.loss.model_dump()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "points of a weight, such as {0: 0.0, 1000: 2.0}, are missing"),
        ("{half: 1}", "'half' is neither a number of steps nor a share of the run in %"),
        ("{101%: 1}", "'101%' is neither"),
        ("{0: 1, 5: 2, 10%: 3}", "its points are in steps or in %, not in both"),
        ("{0: 1, 0%: 2}", "'0' and '0%' are the same point"),
        ("{0: -1}", "should be greater than or equal to 0, found -1"),
        ("{0: much}", "should be a valid number, found 'much'"),
        ("[0, 1]", r"should be a valid number, found \[0, 1\]"),
    ],
)
def test_points_that_make_no_sense_are_one_line(text, message):
    with pytest.raises(RecipeError, match=rf"^recipe: loss.caption_weight: .*{message}") as caught:
        weights(text, 1)
    assert "\n" not in str(caught.value)


def test_points_of_a_stage_are_counted_over_it():
    stages = [{"steps": 4}, {"steps": 4, "caption_weight": {"0%": 0.0, "100%": 4.0}}, {"steps": 2}]
    run = {"schedule__stages": stages, "loss__contrastive_weight": {0: 0.0, 10: 1.0}}
    recipe = tiny_recipe(train__steps=None, **run)
    rows = stages_of(recipe, lambda: None)
    found = [loss_weights_of(rows, step) for step in range(10)]
    assert [f["contrastive"] for f in found] == pytest.approx([n / 10 for n in range(10)])
    assert [f["caption"] for f in found] == [2.0] * 4 + [0.0, 1.0, 2.0, 3.0] + [2.0] * 2
    assert weights_move(rows)
    assert weights_move(rows[1:2])
    assert not weights_move(stages_of(tiny_recipe(), lambda: None))


def test_length_from_steps_samples_and_epochs():
    batch = {"global_batch": 64, "micro_batch": 64}
    assert total_steps(TrainSection(steps=7, **batch), None) == 7
    assert total_steps(TrainSection(samples=65, **batch), None) == 2
    assert total_steps(TrainSection(epochs=1.5, **batch), 640) == 15
    with pytest.raises(UserError, match=r"data\.train_samples"):
        total_steps(TrainSection(epochs=1.0, **batch), None)
