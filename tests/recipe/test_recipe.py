"""Recipes: what is accepted, what is refused, and with which words."""

from pathlib import Path

import pytest

from coca_scale.errors import UserError
from coca_scale.recipe import BatchSplit, RecipeError, dump_recipe, load_recipe, recipe_from_dict
from coca_scale.recipe.load import parse_yaml
from tests.conftest import tiny_recipe

RECIPES = sorted(Path("recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_are_valid_and_round_trip(path):
    recipe = load_recipe(path)
    assert recipe_from_dict(parse_yaml(dump_recipe(recipe))) == recipe


def test_unknown_key_names_the_nearest():
    with pytest.raises(RecipeError, match=r"train\.micro_batchs: unknown key; did you mean train"):
        load_recipe("recipes/tiny.yaml", ["train.micro_batchs=3"])


def test_key_in_the_wrong_section_is_pointed_to():
    with pytest.raises(RecipeError, match=r"did you mean engine\.precision"):
        load_recipe("recipes/tiny.yaml", ["train.precision=bf16"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.global_batch=true", "valid integer"),
        ("train.global_batch=0", "greater than or equal to 1"),
        ("optim.lr=fast", "valid number"),
        ("engine.zero_stage=4", "input should be 0, 1, 2 or 3"),
        ("optim", "key.path=value"),
        ("engine.zero_stage.x=1", "a value, not a section"),
    ],
)
def test_wrong_values_are_refused(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("recipes/tiny.yaml", [override])


def test_all_faults_are_listed_at_once():
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipes/tiny.yaml", ["train.x=1", "optim.y=2", "optim.lr=-1"])
    assert len(str(caught.value).splitlines()) == 3


def test_missing_and_malformed_files(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("run: [")
    with pytest.raises(RecipeError, match="not readable as YAML"):
        load_recipe(bad)


def test_exponent_without_point_is_a_number():
    assert load_recipe("recipes/tiny.yaml", ["optim.lr=3e-4"]).optim.lr == 3e-4


def test_overriding_a_length_replaces_the_others():
    recipe = load_recipe("recipes/tiny.yaml", ["train.samples=1000"])
    assert recipe.train.steps is None
    assert recipe.train.samples == 1000


def test_stage_0_needs_fp32():
    with pytest.raises(RecipeError, match="fp32 only"):
        tiny_recipe(engine__zero_stage=0, engine__precision="bf16")


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_batch_plan_divides_exactly(ranks):
    plan = BatchSplit.from_recipe(tiny_recipe(train__micro_batch=2), ranks)
    assert plan.ranks * plan.accumulation * plan.micro_batch == 16
    assert plan.lanes * plan.samples_per_lane == 16
    assert plan.lanes_per_rank * ranks == plan.lanes


@pytest.mark.parametrize("ranks", [64, 384, 4096])
def test_large_recipe_fits_the_planned_clusters(ranks):
    recipe = load_recipe("recipes/large.yaml", ["train.micro_batch=8"])
    assert BatchSplit.from_recipe(recipe, ranks).samples_per_rank == 98304 // ranks


def test_batch_that_does_not_divide_says_what_would():
    with pytest.raises(UserError, match="does not divide over 3 ranks"):
        BatchSplit.from_recipe(tiny_recipe(), 3)
    with pytest.raises(UserError, match=r"train\.micro_batch=4 would"):
        BatchSplit.from_recipe(tiny_recipe(train__micro_batch=6), 2)
    with pytest.raises(UserError, match=r"data\.lanes=5"):
        BatchSplit.from_recipe(tiny_recipe(data__lanes=5), 1)
