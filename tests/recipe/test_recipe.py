"""Recipes: what is accepted, what is refused, and with which words."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coca_scale.errors import UserError
from coca_scale.recipe import BatchSplit, RecipeError, dump_recipe, load_recipe, recipe_from_dict
from coca_scale.recipe.load import schema_json
from coca_scale.recipe.total_steps import total_steps
from coca_scale.recipe.yaml_text import parse_yaml
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
        # and no class of ours is told of
        (
            "data.train=~",
            "data.train.0: should hold shards .a pattern, or a list of them., found No",
        ),
        ("data.val=[3]", "data.val.0: should hold shards .*, found 3"),
        ("optim=3", "optim: should hold keys, found 3"),
    ],
)
def test_wrong_values_are_refused(override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("recipes/tiny.yaml", [override])


def numeric_keys(node, path=()):
    """Paths of all keys of the schema that take a number, with what is said of it."""
    for name, field in node.get("properties", {}).items():
        for form in (field, *field.get("anyOf", ())):
            if form.get("type") in ("integer", "number") and "enum" not in form:
                yield (*path, name), form
            if (target := form.get("$ref")) is not None:
                yield from numeric_keys(SCHEMA["$defs"][target.rpartition("/")[2]], (*path, name))


SCHEMA = json.loads(schema_json())
NUMBERS = dict(numeric_keys(SCHEMA))


@pytest.mark.parametrize("path", [p for p, form in NUMBERS.items() if form["type"] == "integer"])
@settings(max_examples=5)
@given(st.integers(min_value=2**63) | st.integers(max_value=-1))
def test_integers_have_ranges(path, number):
    assert "maximum" in NUMBERS[path]
    with pytest.raises(RecipeError, match=rf"{re.escape('.'.join(path))}: .*than or equal to"):
        load_recipe("recipes/tiny.yaml", [f"{'.'.join(path)}={number}"])


@pytest.mark.parametrize("name", ["start", "step", "save"])
def test_a_time_limit_is_one_that_can_be_waited_for(name):
    with pytest.raises(RecipeError, match="less than or equal to 1000000"):
        load_recipe("recipes/tiny.yaml", [f"engine.{name}_timeout_minutes=1e300"])


def test_a_run_is_no_longer_than_names_of_checkpoints_can_count():
    with pytest.raises(UserError, match="at most 99,999,999 can be counted"):
        total_steps(tiny_recipe(train__steps=None, train__epochs=1e300).train, 10**6)


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


def test_local_saves_are_between_the_others():
    assert tiny_recipe(checkpoint__local_every_steps=999).checkpoint.local_dir is None
    assert tiny_recipe(checkpoint__local_every_steps=5000, checkpoint__every_steps=None)
    with pytest.raises(RecipeError, match="local_every_steps 1000 is for saves between"):
        tiny_recipe(checkpoint__local_every_steps=1000)


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "csv_monitor", "comet"])
def test_deepspeed_tells_nobody_of_a_run(name):
    with pytest.raises(RecipeError, match=f"deepspeed.{name} .* log.wandb do that"):
        tiny_recipe(engine__deepspeed={name: {"enabled": True}})


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
