"""What `activation_checkpointing: auto` comes to."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

from coca_scale.planning.fit import MARGIN, plan_run
from coca_scale.planning.gpus import GPUS
from tests.conftest import tiny_recipe
from tests.ranks import on_ranks, quiet


def planned(mode, memory_bytes=20e9, **changes):
    recipe = tiny_recipe(
        model__name="coca_ViT-B-32",
        train__global_batch=64,
        train__micro_batch=64,
        engine__activation_checkpointing=mode,
        **changes,
    )
    gpu = replace(GPUS["a100-40gb"], memory_bytes=memory_bytes)
    _, costs, plan = plan_run(recipe, 1, gpu)
    return costs, plan


def test_auto_is_the_first_that_fits():
    nothing, little, all_blocks = (
        planned(mode)[1].total_bytes for mode in ("none", "selective", "full")
    )
    assert nothing > little > all_blocks
    between = (little + all_blocks) / 2
    for room, mode, some_blocks in (
        (nothing, "none", False),
        (little, "selective", False),
        (between, "selective", True),
        (all_blocks / 2, "full", False),
    ):
        costs, plan = planned("auto", (room + 1e6) / (1 - MARGIN))
        assert costs.checkpointing == mode
        assert (0 < costs.recomputed < costs.blocks) == some_blocks
        assert plan.fits == (room >= all_blocks)


def test_auto_keeps_to_a_budget():
    _, plan = planned("selective")
    costs, within = planned("auto", engine__activation_budget_gb=plan.activations_bytes / 1.5e9)
    assert costs.checkpointing == "selective"
    assert 0 < costs.recomputed < costs.blocks
    assert within.activations_bytes <= plan.activations_bytes / 1.5


def notes_on_rank(_rank, _ranks, recipe):
    from coca_scale.engine.launch import end_world, start_world
    from coca_scale.model.recompute import SelectiveRecompute
    from coca_scale.training.setup import set_up

    with quiet():
        setup = set_up(recipe, start_world(60))
    with closing(setup.engine):
        modules = setup.engine.module.modules()
        selective = {m.selective for m in modules if isinstance(m, SelectiveRecompute)}
    end_world()
    return setup.notes, selective


def test_a_run_says_what_it_has_chosen(tmp_path):
    auto = {"engine__activation_checkpointing": "auto", "engine__kept_graphs": "auto"}
    recipe = tiny_recipe(run__dir=str(tmp_path), train__micro_batch=2, **auto)
    for notes, selective in on_ranks(notes_on_rank, 2, recipe):
        assert "activation_checkpointing auto is none" in notes
        assert "kept_graphs auto is 4 of 4 micro-batches" in notes
        assert selective == {False}
