"""The same optimisation problem for any ZeRO stage, ranks, micro-batch and accumulation."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch

from tests.conftest import tiny_recipe
from tests.ranks import on_ranks

BATCH, STEPS = 16, 20


def batch_of(step):
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (BATCH, 3, 48, 48), generator=generator, dtype=torch.uint8)
    tokens = torch.zeros(BATCH, 16, dtype=torch.long)
    for row in range(BATCH):  # uneven lengths, and a first rank with nothing to caption
        length = 1 if row < 4 else 3 + (row + step) % 13
        tokens[row, :length] = torch.randint(1, 1024, (length,), generator=generator)
    return images, tokens


def curves_on_rank(rank, ranks, layouts):
    with Path(os.devnull).open("w") as silence, contextlib.redirect_stdout(silence):
        return _curves(rank, ranks, layouts)


def _curves(rank, ranks, layouts):
    from coca_scale.engine.core import TrainEngine
    from coca_scale.engine.launch import start_world
    from coca_scale.model import CoCa, LogitScale, load_model_config
    from coca_scale.recipe import BatchPlan

    world = start_world()
    curves = []
    for stage, micro, lr, precision, recompute in layouts:
        recipe = tiny_recipe(
            engine__zero_stage=stage,
            engine__precision=precision,
            engine__activation_checkpointing=recompute,
            train__micro_batch=micro,
            optim__lr=lr,
        )
        torch.manual_seed(0)
        model = CoCa(load_model_config("coca_tiny"))
        engine = TrainEngine(
            model, LogitScale(), recipe, BatchPlan.from_recipe(recipe, ranks), world
        )
        curve = []
        rows = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
        for step in range(STEPS):
            images, tokens = batch_of(step)
            result = engine.step(images[rows], tokens[rows], lr)
            curve.append((result.loss, result.grad_norm, result.logit_scale))
        engine.close()
        curves.append(curve)
    return curves


LOW, HIGH = 1e-4, 1e-3
LAYOUTS = {
    1: [(0, 16, LOW, "fp32", "none"), (0, 16, HIGH, "fp32", "none"), (3, 4, LOW, "fp32", "none")],
    2: [
        (0, 8, LOW, "fp32", "none"),
        (1, 4, LOW, "fp32", "selective"),
        (2, 2, LOW, "fp32", "none"),
        (3, 8, LOW, "fp32", "none"),
        (3, 2, LOW, "fp32", "full"),
        (3, 8, LOW, "fp32", "selective"),
        (3, 8, HIGH, "fp32", "none"),
        (3, 8, HIGH, "fp32", "none"),
        (3, 4, LOW, "bf16", "none"),
    ],
    4: [(3, 2, LOW, "fp32", "none"), (2, 4, HIGH, "fp32", "none")],
}


@pytest.mark.slow
def test_all_layouts_give_the_same_curve():
    curves = {
        (ranks, number, layout): curve
        for ranks, layouts in LAYOUTS.items()
        for number, (layout, curve) in enumerate(
            zip(layouts, on_ranks(curves_on_rank, ranks, layouts)[0], strict=True)
        )
    }
    reference = {lr: curves[1, i, (0, 16, lr, "fp32", "none")] for i, lr in enumerate((LOW, HIGH))}
    worst = {LOW: 0.0, HIGH: 0.0}
    for (ranks, _, layout), curve in curves.items():
        _, _, lr, precision, _ = layout
        expected = reference[lr]
        relative = [abs(a[0] - b[0]) / b[0] for a, b in zip(curve, expected, strict=True)]
        if precision == "bf16":
            assert relative[0] < 2e-3, (ranks, layout)
            assert max(relative) < 2e-2, (ranks, layout)
            continue
        assert relative[0] <= 1e-6, (ranks, layout)
        norm, expected_norm = curve[0][1], expected[0][1]
        assert abs(norm - expected_norm) <= 1e-5 * expected_norm, (ranks, layout)
        worst[lr] = max(worst[lr], *relative)
        scales = [abs(a[2] - b[2]) / b[2] for a, b in zip(curve, expected, strict=True)]
        assert max(scales) <= 1e-5, (ranks, layout)
    print(f"largest relative difference of the loss over {STEPS} steps: {worst}")
    assert worst[LOW] <= 1e-5
    assert worst[HIGH] <= 1e-3
    first, second = (curves[2, number, LAYOUTS[2][number]] for number in (6, 7))
    assert first == second  # the same layout again: bit-exact
