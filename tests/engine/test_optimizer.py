"""What a checkpoint says of its optimizer."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from coca_scale.engine.optimizer import KINDS, kind_of, only_where
from coca_scale.engine.zero_slices import SavedState
from coca_scale.recipe import RecipeError
from tests.conftest import tiny_recipe
from tests.engine.batches import BATCH, batch_of
from tests.ranks import on_ranks, quiet


def load_on_rank(rank, ranks, folder):
    from coca_scale.engine.launch import end_world, start_world
    from coca_scale.engine.scale_file import SCALE_FILE
    from coca_scale.engine.train_engine import TrainEngine
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
            engine.load_state(folder)
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


@pytest.mark.parametrize("name", KINDS)
def test_an_optimizer_keeps_its_moments_and_heeds_what_is_not_finite(name):
    optim = tiny_recipe(optim__name=name).optim
    kind = kind_of(optim)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = kind.make([{"params": [parameter]}], optim)
    parameter.grad = torch.full((3,), torch.nan)
    only_where(optimizer, torch.tensor(False))
    optimizer.step()
    assert parameter.tolist() == [1, 1, 1]
    parameter.grad = torch.ones(3)
    only_where(optimizer, torch.tensor(True))
    optimizer.step()
    assert (parameter < 1).all() and parameter.isfinite().all()
    assert set(optimizer.state[parameter]) - {"step"} == set(kind.moments)
    assert optimizer.state[parameter]["step"] == 1


def test_muon_is_refused_by_name():
    with pytest.raises(RecipeError, match=r"^recipe: optim.name: muon is not offered: .*adamw$"):
        tiny_recipe(optim__name="muon")


STEPS = 3


def resume_on_rank(rank, ranks, folder, layouts):
    """Train from what is in `folder`, or from the start, under one layout after the other."""
    from coca_scale.engine.launch import end_world, start_world
    from coca_scale.engine.train_engine import TrainEngine
    from coca_scale.model import CoCa, LogitScale, load_model_config
    from coca_scale.recipe import BatchSplit

    world = start_world(60)
    rows = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    curves = []
    for number, (stage, start) in enumerate(layouts):
        recipe = tiny_recipe(
            optim__name="nadamw", engine__zero_stage=stage, train__micro_batch=BATCH // ranks
        )
        torch.manual_seed(0)
        split = BatchSplit.from_recipe(recipe, ranks)
        curve: list[tuple[float, float, float]] = []
        with quiet():
            model = CoCa(load_model_config("coca_tiny"))
            engine = TrainEngine(model, LogitScale(), recipe, split, world)
            if start is not None:
                assert engine.load_state(folder / "first") == (start == "other")
            first = 0 if start is None else STEPS
            for step in range(first, 2 * STEPS):
                if step == STEPS:  # saved where nothing is lost, and where everything came back
                    target = folder / ("first" if start is None else f"{ranks}-{number}")
                    world.on_first(partial(target.mkdir, parents=True))
                    engine.save_state(target).result()
                    world.barrier()
                images, tokens = batch_of(step)
                flight = engine.step(images[rows], engine.lay_out(tokens[rows]), 1e-3)
                result = flight.result()
                curve.append((result.loss, result.grad_norm, result.logit_scale))
        engine.close()
        curves.append(curve[-STEPS:])
    end_world()
    return curves


def everything(folder):
    saved = SavedState(folder)
    kinds = (None, "exp_avg", "exp_avg_sq")
    return {(name, kind): saved.whole(name, kind) for name in saved.shapes for kind in kinds}


@pytest.mark.slow
def test_nadamw_goes_on_to_the_bit_and_on_other_ranks_and_stages(tmp_path):
    straight, again, one = on_ranks(
        resume_on_rank, 2, tmp_path, [(3, None), (3, "same"), (1, "other")]
    )[0]
    (single,) = on_ranks(resume_on_rank, 1, tmp_path, [(2, "other")])[0]
    assert again == straight
    for curve in (one, single):
        for found, expected in zip(curve, straight, strict=True):
            assert found == pytest.approx(expected, rel=1e-4)
    expected = everything(tmp_path / "first")
    assert any(kind == "exp_avg_sq" and value.any() for (_, kind), value in expected.items())
    for name in ("2-1", "2-2", "1-0"):
        found = everything(tmp_path / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
