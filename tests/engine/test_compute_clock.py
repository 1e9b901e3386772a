"""A device that is slow inside a step, where all others wait for it, is found out."""

from __future__ import annotations

import io
from contextlib import redirect_stderr

import pytest
import torch

from tests.conftest import tiny_recipe
from tests.json_lines import curve, lines_of
from tests.ranks import on_ranks, quiet

STEPS = 3  # readings until it is named
LAYOUTS = {
    "ZeRO-2": {"engine__zero_stage": 2},
    "ZeRO-3, twice, full": {
        "engine__zero_stage": 3,
        "train__micro_batch": 4,
        "engine__activation_checkpointing": "full",
    },
}


def train_on_rank(rank, _ranks, recipes):
    """Train them; where `slow`, rank 1 has more to do inside its image tower. What was said."""
    from coca_scale.engine.launch import start_world
    from coca_scale.training.trainer import Trainer

    world, told = start_world(), []
    for recipe, slow in recipes:
        with quiet(), redirect_stderr(io.StringIO()) as said:
            trainer = Trainer(recipe, world)
            if slow and rank == 1:
                for block in trainer.engine.module.image.blocks:
                    block.mlp.register_forward_hook(work)
            trainer.run()
            trainer.close()
        told.append(said.getvalue())
    return told


def work(*_):
    """Many times what a tiny block has."""
    x = torch.ones(512, 512)
    for _ in range(10):
        x = x @ x / 512


@pytest.mark.slow
def test_a_rank_that_computes_longer_is_named_and_nothing_else_changes(tmp_path):
    recipes, folders = [], {}
    for name, layout in LAYOUTS.items():
        for slow, every in ((True, 1), (False, STEPS)):
            folder = folders[name, slow] = tmp_path / f"{name} {slow}"
            changes = {"run__dir": str(folder), "train__steps": STEPS, **layout}
            recipes.append((tiny_recipe(**changes, log__every_steps=every), slow))
    told, _ = on_ranks(train_on_rank, 2, recipes)
    for number, (name, slow) in enumerate(folders):
        lines = lines_of(folders[name, slow] / "metrics.jsonl")
        assert len(lines) == (STEPS if slow else 1)
        assert all(line["compute_seconds"] > 0 for line in lines)
        if slow:
            assert {line["compute_slowest_rank"] for line in lines} == {1}
            assert min(line["compute_slowdown"] for line in lines) > 2
            assert (
                f"slow device: rank 1 on {lines[0]['compute_slowest_host']} computes"
                in told[number]
            )
            timed = curve(folders[name, slow], STEPS)[-1]
        else:  # timed in one step only, with as much work on both
            assert (lines[0]["loss"], lines[0]["grad_norm"], lines[0]["logit_scale"]) == timed
            assert "slow device" not in told[number]


@pytest.mark.slow
def test_layers_that_wait_for_weights_inside_are_not_timed(tmp_path):
    recipe = tiny_recipe(
        run__dir=str(tmp_path / "run"), train__steps=1, model__lock_image=True, engine__zero_stage=3
    )
    on_ranks(train_on_rank, 2, [(recipe, False)])
    assert "compute_slowdown" not in lines_of(tmp_path / "run" / "metrics.jsonl")[0]
