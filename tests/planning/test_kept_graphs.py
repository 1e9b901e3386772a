"""Graphs of towers that a step keeps: what they cost and save, how many there is room for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coca_scale.planning.costs import blocks_to_recompute, caption_quantiles, count_costs
from coca_scale.planning.counting import LiveBytes
from coca_scale.planning.fit import MARGIN, plan_run
from coca_scale.planning.gpus import GPUS
from coca_scale.planning.plan import make_plan
from coca_scale.recipe import BatchSplit, load_recipe
from tests.conftest import tiny_recipe
from tests.ranks import on_ranks, quiet

MICRO, MICRO_BATCHES = 16, 4


def settings(graphs, **changes):
    recipe = tiny_recipe(
        train__global_batch=MICRO * MICRO_BATCHES,
        train__micro_batch=MICRO,
        engine__kept_graphs=graphs,
        **changes,
    )
    return recipe, BatchSplit.from_recipe(recipe, 1)


def peaks_on_rank(_rank, _ranks, numbers):
    """Most bytes alive that a step has made, but for what DeepSpeed and the optimizer keep."""
    from coca_scale.engine.launch import start_world

    with quiet():
        world = start_world()
        return [_peak(world, number) for number in numbers]


def _peak(world, number):
    from coca_scale.engine.train_engine import TrainEngine
    from coca_scale.model import CoCa, LogitScale, load_model_config

    recipe, split = settings(number)
    config = load_model_config("coca_tiny")
    engine = TrainEngine(CoCa(config), LogitScale(), recipe, split, world)
    mean = recipe.data.mean_tokens
    tokens = caption_quantiles(MICRO, mean, config.context_length, config.pad_id)
    captions = engine.lay_out(tokens.repeat(MICRO_BATCHES, 1))
    images = torch.zeros(MICRO * MICRO_BATCHES, 3, 48, 48, dtype=torch.uint8)
    engine.step(images, captions, 1e-4)  # DeepSpeed and the optimizer make what they keep
    with LiveBytes() as live:
        engine.step(images, captions, 1e-4)
    engine.close()
    return live.peak


def test_a_graph_takes_in_a_step_what_is_planned():
    one, three, four = on_ranks(peaks_on_rank, 1, (1, 3, 4))[0]
    costs = count_costs(*settings(4))
    print(f"{(four - one) / 3 / costs.graph_bytes - 1:+.2%} of {costs.graph_bytes:,} bytes")
    assert four - one == pytest.approx(3 * costs.graph_bytes, rel=0.02)
    assert three - one == pytest.approx(2 * costs.graph_bytes, rel=0.02)
    assert costs.activations_bytes - costs.peak_bytes == 3 * costs.graph_bytes


def test_towers_of_a_kept_graph_are_paid_for_once():
    costs = count_costs(*settings(0))
    recipe, batch = settings(0)

    def flops(graphs):
        kept = replace(costs, kept_graphs=graphs)
        plan = make_plan(recipe, batch, kept, GPUS["h100-80gb"], 1, None)
        return plan.flops_per_sample * MICRO

    assert flops(0) == costs.step_flops + costs.tower_flops
    assert flops(1) == pytest.approx(costs.step_flops + 0.75 * costs.tower_flops)
    assert flops(4) == costs.step_flops


def planned(graphs, memory_bytes, **changes):
    recipe, _ = settings(graphs, **changes)
    gpu = replace(GPUS["a100-40gb"], memory_bytes=memory_bytes / (1 - MARGIN))
    _, costs, plan = plan_run(recipe, 1, gpu)
    return costs, plan


def test_auto_keeps_as_many_as_there_is_room_for():
    costs, plan = planned(3, 20e9)
    for missing, graphs in ((0, 3), (1e4, 2), (costs.graph_bytes, 2), (1e12, 1)):
        found, _ = planned("auto", plan.total_bytes + 1e3 - missing)
        assert found == replace(costs, kept_graphs=graphs)


def test_auto_of_both_recomputes_first_and_keeps_within_a_budget():
    both = {"engine__activation_checkpointing": "auto"}
    costs, plan = planned("auto", 20e9, **both)
    assert (costs.checkpointing, costs.kept_graphs) == ("none", 4)
    budget = (costs.peak_bytes + 1.5 * costs.graph_bytes) / 1e9
    within, _ = planned("auto", 20e9, engine__activation_budget_gb=budget, **both)
    assert (within.checkpointing, within.kept_graphs) == ("none", 2)
    assert within.activations_bytes <= budget * 1e9
    tight = plan.total_bytes - plan.activations_bytes + costs.peak_bytes / 3
    some, _ = planned("auto", tight, **both)
    assert (some.checkpointing, some.kept_graphs) == ("selective", 1)
    assert some.recomputed


def test_a_budget_holds_for_the_graphs_that_wait():
    one = count_costs(*settings(1))
    budget = one.peak_bytes * 1.2 / 1e9
    recipe, batch = settings(3, engine__activation_budget_gb=budget)
    costs = count_costs(recipe, batch)
    assert costs.kept_graphs == 3
    assert 0 < costs.recomputed < costs.blocks
    assert 0.8 * budget * 1e9 < costs.activations_bytes <= budget * 1e9
    assert len(blocks_to_recompute(recipe, batch)) == costs.recomputed


@pytest.mark.parametrize(
    ("gpu", "graphs", "gflops"), [("h100-80gb", 2, 676), ("h200-141gb", 4, 634)]
)
def test_large_on_64_gpus(gpu, graphs, gflops):
    _, costs, plan = plan_run(load_recipe(Path("recipes/large.yaml")), 64, GPUS[gpu])
    assert costs.kept_graphs >= graphs
    assert plan.flops_per_sample < gflops * 1e9
    assert plan.fits
