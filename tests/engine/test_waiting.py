"""The host hands a step to the device without asking it for a number."""

from __future__ import annotations

import copy
import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import tiny_recipe
from tests.engine.batches import BATCH, batch_of
from tests.ranks import on_ranks, quiet

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Reads(TorchDispatchMode):
    """Records from where a tensor's value is asked for, as `float` and `if` do."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS:
            frames = traceback.extract_stack()[:-1]
            self.places.append(" < ".join(f"{f.filename}:{f.lineno}" for f in frames[-3:]))
        return func(*args, **(kwargs or {}))


def reads_on_rank(rank, ranks, cases):
    """Where values are read in a step of each case, before its result is asked for."""
    from coca_scale.engine.launch import start_world

    with quiet():
        world = start_world()
        with Reads() as seen:
            float(torch.ones(()))
        assert seen.places  # the check does see them
        return [_reads(rank, ranks, world, changes) for changes in cases]


def _reads(rank, ranks, world, changes):
    from coca_scale.engine.teacher import RunningTeacher
    from coca_scale.engine.train_engine import TrainEngine
    from coca_scale.model import CoCa, LogitScale, load_model_config
    from coca_scale.model.weights import Model
    from coca_scale.recipe import BatchSplit

    recipe = tiny_recipe(**changes)
    model, teacher = CoCa(load_model_config("coca_tiny")), None
    if recipe.loss.distill.teacher is not None:
        towers = Model(copy.deepcopy(model).eval().requires_grad_(False), LogitScale())
        cut = recipe.loss.distill.placement == "sharded"
        teacher = RunningTeacher(towers, torch.float32, world, cut)
    split = BatchSplit.from_recipe(recipe, ranks)
    engine = TrainEngine(model, LogitScale(), recipe, split, world, (), teacher)
    rows = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    images, tokens = (whole[rows] for whole in batch_of(0))
    about = (engine.lay_out(tokens), 1e-3, 0, None, engine.lay_out_lesson(tokens))
    for _ in range(3):  # in the first ones DeepSpeed compares the order of modules over ranks
        engine.step(images, *about)
    with Reads() as reads:
        flight = engine.step(images, *about)
    assert flight.result().applied
    engine.close()
    return sorted(set(reads.places))


def test_a_step_asks_the_device_for_nothing():
    layouts = [(3, "fp32"), (3, "bf16"), (2, "bf16"), (1, "bf16"), (0, "fp32")]
    cases = [
        {
            "engine__zero_stage": stage,
            "engine__precision": precision,
            "train__micro_batch": size,
            "optim__ema_decay": 0.9 if stage else None,
        }
        for stage, precision in layouts
        for size in (8, 4)
    ]
    cases += [
        {**case, "engine__kept_graphs": 1} for case in cases if case["train__micro_batch"] == 4
    ]
    learns = {"teacher": "itself", "feature_weight": 1.0}
    cases += [
        {"loss__distill": {**learns, "placement": placement}, "train__micro_batch": size}
        for placement, size in (("replicated", 8), ("sharded", 4))
    ]
    assert on_ranks(reads_on_rank, 2, cases) == [[[]] * len(cases)] * 2
