"""Gradients of several micro-batches."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from coca_scale.engine.config import deepspeed_config, transfers
from coca_scale.recipe import BatchSplit
from tests.conftest import tiny_recipe
from tests.ranks import on_ranks, quiet

MICRO_BATCHES, WIDTH = 16, 4096


class Sum(nn.Module):
    """Of its weights, each times a number: these are its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, numbers):
        return (self.weight * numbers).sum()


def numbers_of(micro_batch):
    generator = torch.Generator().manual_seed(micro_batch)
    return torch.randn(WIDTH, generator=generator).bfloat16()


def norms_on_rank(_rank, ranks, cases):
    from coca_scale.engine.launch import start_world
    from coca_scale.engine.writing import FileWriter
    from coca_scale.engine.zero import ZeroEngine

    start_world()
    return [_norm(ranks, FileWriter, ZeroEngine, changes) for changes in cases]


def _norm(ranks, writer, engine_class, changes):
    recipe = tiny_recipe(
        engine__precision="bf16",
        train__global_batch=ranks * MICRO_BATCHES,
        train__micro_batch=1,
        **changes,
    )
    split, model = BatchSplit.from_recipe(recipe, ranks), Sum()
    config = deepspeed_config(recipe, split, transfers(model), 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    moments = ("exp_avg", "exp_avg_sq")
    with quiet():
        engine = engine_class(model, optimizer, moments, config, writer(partial(int, 0)))
    for number in range(MICRO_BATCHES):
        engine.backward(engine(numbers_of(number)))  # the same on all ranks: their average is exact
        if number + 1 < MICRO_BATCHES:
            engine.end_micro_batch()
    norm, applied = engine.update()
    assert applied
    engine.close()
    return float(norm)


def test_gradients_are_added_in_fp32():
    cases = [
        {"engine__zero_stage": 3},
        {"engine__zero_stage": 3, "engine__offload": "optimizer"},
        {"engine__zero_stage": 2},
    ]
    total = torch.stack([numbers_of(number).double() for number in range(MICRO_BATCHES)]).sum(0)
    expected = float(total.norm())
    for norms in on_ranks(norms_on_rank, 2, cases):
        for norm, case in zip(norms, cases, strict=True):
            print(case, norm / expected - 1)
            assert abs(norm / expected - 1) < 1e-6, case  # 1.4e-4 in bf16
