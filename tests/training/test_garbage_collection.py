"""Garbage between steps, and that no activation waits for it to be collected."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from coca_scale.losses import FeatureGather, contrastive_loss
from coca_scale.model import CoCa, load_model_config
from coca_scale.training.garbage_collection import GarbageCollection


class Cycle:
    def __init__(self):
        self.me = self


def test_garbage_is_collected_after_some_steps_and_not_between():
    with GarbageCollection(2) as garbage:
        cycle = weakref.ref(Cycle())
        garbage.after_step(1)
        assert not gc.isenabled() and cycle() is not None
        garbage.after_step(2)
        assert cycle() is None
    assert gc.isenabled() and gc.get_freeze_count() == 0
    with GarbageCollection(None) as garbage:
        garbage.after_step(2)
        assert gc.isenabled()


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_no_activation_is_garbage(mode):
    torch.manual_seed(0)
    coca = CoCa(load_model_config("coca_tiny"))
    coca.set_activation_checkpointing(mode)

    def step():
        captions = coca.text.pack(torch.randint(1, 1024, (8, 16)))
        features, sums = coca(torch.randn(8, 3, 48, 48), captions)
        gather = FeatureGather(features.detach(), None)
        result = contrastive_loss(gather, torch.tensor([2.0]), None, 8)
        ((features * result.grad_features).sum() + sums["caption"]).backward()

    step()
    gc.collect()
    gc.disable()
    try:
        step()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found = [o for o in gc.garbage if isinstance(o, torch.Tensor) and o.numel() > 1000]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert found == []
