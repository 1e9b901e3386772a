"""What a checkpoint says of its optimizer."""

from __future__ import annotations

import pytest
import torch

from coca_scale.engine.optimizer import kind_of
from tests.conftest import tiny_recipe
from tests.ranks import on_ranks, quiet


def load_on_rank(rank, ranks, folder):
    from coca_scale.engine.launch import end_world, start_world
    from coca_scale.engine.train_engine import SCALE_FILE, TrainEngine
    from coca_scale.errors import UserError
    from coca_scale.model import CoCa, LogitScale, load_model_config
    from coca_scale.recipe import BatchSplit

    world = start_world(60)
    recipe = tiny_recipe(train__global_batch=8, train__micro_batch=8)
    torch.manual_seed(0)
    with quiet():
        model = CoCa(load_model_config("coca_tiny"))
        split = BatchSplit.from_recipe(recipe, ranks)
        engine = TrainEngine(model, LogitScale(), recipe, split, world)
        images = torch.zeros(8, 3, 48, 48, dtype=torch.uint8)
        tokens = torch.randint(3, 1000, (8, 16))
        for _ in range(3):
            engine.step(images, engine.lay_out(tokens), 1e-3)
        folder.mkdir()
        engine.save_state(folder).result()
    saved = torch.load(folder / SCALE_FILE, weights_only=True)
    counts = [saved["updates"]]
    for changes in ({"updates": None, "optimizer_kind": None}, {"optimizer_kind": "lion"}):
        changed = {k: v for k, v in (saved | changes).items() if v is not None}
        torch.save(changed, folder / SCALE_FILE)
        try:
            engine.load_state(folder, None)
            counts.append(engine._updates)
        except UserError as error:
            counts.append(str(error))
    engine.close()
    end_world()
    return counts


@pytest.mark.slow
def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    (found,) = on_ranks(load_on_rank, 1, tmp_path / "state")
    assert found[:2] == [3, 3]  # also one of before there was a count
    assert found[2].endswith("was written with the optimizer lion, this run has adamw")


def test_moments_are_what_the_optimizer_keeps():
    recipe = tiny_recipe()
    kind = kind_of(recipe.optim)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = kind.make([{"params": [parameter]}], recipe.optim)
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert set(optimizer.state[parameter]) - {"step"} == set(kind.moments)
