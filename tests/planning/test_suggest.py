"""Suggested settings against all there are."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
from typer.testing import CliRunner

from coca_scale import cli
from coca_scale.errors import UserError
from coca_scale.planning import suggest as module
from coca_scale.planning.costs import count_costs
from coca_scale.planning.fit import MARGIN, most_graphs
from coca_scale.planning.gpus import GPUS
from coca_scale.planning.plan import make_plan
from coca_scale.planning.suggest import STAGES, WORTH, Choice, suggest
from coca_scale.recipe import BatchSplit
from coca_scale.recipe.load import apply_override, recipe_from_dict
from tests.conftest import tiny_recipe

RANKS, SAMPLES = 4, 16
SIZES = (1, 2, 4, 8, 16)
RECIPE = tiny_recipe(
    train__global_batch=RANKS * SAMPLES, train__micro_batch=2, engine__precision="bf16"
)


@pytest.fixture(scope="module", autouse=True)
def shared_counts():
    """Each case is counted once in all of this file."""
    counted = cache(lambda text, batch, varlen: count_costs(of_json(text), batch, varlen))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module,
            "count_costs",
            lambda recipe, batch, varlen: counted(counted_keys(recipe), batch, varlen),
        )
        yield


def counted_keys(recipe):
    """Without the stage, of which no count depends."""
    raw = recipe.model_dump(mode="json")
    raw["engine"]["zero_stage"] = 3
    return json.dumps(raw)


def of_json(text):
    return recipe_from_dict(json.loads(text))


def card(memory_bytes, **changes):
    return replace(GPUS["a100-40gb"], memory_bytes=memory_bytes, **changes)


def all_plans(gpu):
    """Steps and bytes of every choice without a budget."""
    search = module._Search(RECIPE, RANKS, gpu, 2)
    for micro in SIZES:
        for mode in ("none", "selective", "full"):
            for stage in STAGES:
                choice = Choice(micro, stage, mode)
                batch = replace(
                    BatchSplit.from_recipe(RECIPE, RANKS),
                    micro_batch=micro,
                    accumulation=SAMPLES // micro,
                )
                recipe = search.recipe(choice)
                costs = module.count_costs(recipe, batch, True)
                graphs = most_graphs(recipe, batch, costs, gpu, 2)
                costs = replace(costs, kept_graphs=graphs)
                yield choice, make_plan(recipe, batch, costs, gpu, 2, None)


def settings_of(found):
    raw = RECIPE.model_dump(mode="json")
    for override in found.overrides:
        apply_override(raw, override)
    return recipe_from_dict(raw)


@pytest.mark.parametrize("network_bytes", [25e9, 1e8], ids=["fast links", "slow links"])
def test_the_choice_is_that_of_an_exhaustive_search(network_bytes):
    roomy = card(20e9, network_bytes=network_bytes)
    sizes = sorted(plan.total_bytes for _, plan in all_plans(roomy))
    chosen = set()
    for room in (sizes[len(sizes) // 3], sizes[2 * len(sizes) // 3], sizes[-1]):
        gpu = replace(roomy, memory_bytes=(room + 1) / (1 - MARGIN))
        found = suggest(RECIPE, RANKS, gpu, 2)
        fitting = [plan for _, plan in all_plans(gpu) if plan.total_bytes <= room]
        best = min(plan.step_seconds for plan in fitting)
        assert found.plan.total_bytes <= room + 1
        recipe = settings_of(found)
        assert recipe.train.micro_batch == found.batch.micro_batch
        if recipe.engine.activation_checkpointing == "auto":  # which none of them has
            assert found.costs.recomputed > 0
            assert found.plan.step_seconds <= best * (1 + WORTH)
        else:
            assert found.plan.step_seconds == pytest.approx(best, rel=WORTH)
        chosen.add(tuple(found.overrides))
    assert len(chosen) > 1


def test_nothing_fits_a_device_without_memory():
    with pytest.raises(UserError, match="fits on 4 such devices"):
        suggest(RECIPE, RANKS, card(1e6), 2)


def test_a_page_with_the_price_and_what_would_be_faster():
    arguments = ["plan", "recipes/tiny.yaml", "train.micro_batch=4", "engine.precision=bf16"]
    arguments += ["--gpus", "2", "--gpu", "a100-40gb", "--price", "2.5", "--suggest"]
    page = CliRunner().invoke(cli.app, arguments)
    assert page.exit_code == 0, page.output
    assert "EUR at 2.50 per GPU-hour" in page.output
    assert "suggest   train.micro_batch=32" in page.output
    found = json.loads(CliRunner().invoke(cli.app, [*arguments, "--json"]).stdout)
    assert found["cost_eur"] == pytest.approx(2.5 * found["gpu_hours"])
    assert "train.micro_batch=32" in found["suggestion"]["overrides"]
    assert found["suggestion"]["plan"]["step_seconds"] < found["step_seconds"]
    assert found["step_seconds"] == pytest.approx(
        found["compute_seconds"] + found["exposed_seconds"]
    )
    best = [*arguments, *found["suggestion"]["overrides"]]
    assert "suggest   nothing" in CliRunner().invoke(cli.app, best).output
