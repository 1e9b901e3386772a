"""What can be compiled, and what that keeps; curves are in test_equivalence.py."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo

from coca_scale.engine.compiling import compile_layers
from coca_scale.engine.config import gathered_whole, layers, require_compilable
from coca_scale.errors import UserError
from coca_scale.model import CoCa, load_model_config
from coca_scale.model.freeze import freeze
from coca_scale.model.layers import Block, BlockShape, Stack
from coca_scale.model.recompute import SelectiveRecompute
from tests.conftest import tiny_recipe


def require(name="coca_tiny", **changes):
    recipe = tiny_recipe(engine__compile="blocks", **changes)
    model = CoCa(load_model_config(name))
    freeze(model, recipe.model, recipe.loss)
    require_compilable(model, recipe.engine)
    return model


@pytest.mark.parametrize("locked", [{"model__lock_text": True}, {"loss__contrastive_weight": 0.0}])
def test_compiled_blocks_that_are_not_gathered_whole_are_refused(locked):
    with pytest.raises(UserError, match="needs every weight to train"):
        require(**locked)
    require(**locked, engine__zero_stage=2)
    require()


def test_a_clip_without_captions_to_learn_can_be_compiled():
    model = require("clip_tiny", loss__caption_weight=0.0)
    assert gathered_whole(model) == layers(model) == list(model.blocks().values())


def kept_and_found(compiled, selective):
    """Widths per token that three blocks in a row keep, their output and gradients."""
    torch.manual_seed(0)
    blocks = Stack(Block(BlockShape(64, 4, 4.0, 2, False)) for _ in range(3))
    for module in blocks.modules():
        if isinstance(module, SelectiveRecompute):
            module.selective = selective
    if compiled:
        torch._dynamo.reset()
        compile_layers(blocks)
    weights = {p.untyped_storage().data_ptr() for p in blocks.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = start = torch.randn(8, 33, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for block in blocks:
            x = block(x)
    (x * torch.randn_like(x)).sum().backward()
    gradients = [start.grad, *(p.grad for p in blocks.parameters())]
    return sum(kept.values()) / x.nbytes / len(blocks), [x, *gradients]


def test_compiled_blocks_keep_as_little_and_compute_the_same():
    _, expected = kept_and_found(compiled=False, selective=False)
    whole, _ = kept_and_found(compiled=True, selective=False)
    kept, found = kept_and_found(compiled=True, selective=True)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()
    assert len(torch._dynamo.utils.counters["graph_break"]) == 0
    assert kept < 11 < 15 < whole, (kept, whole)
