"""What can be compiled, and what that keeps; curves are in test_equivalence.py."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch._dynamo

from coca_scale.engine.compiling import compile_layers
from coca_scale.engine.config import gathered_whole, layers, require_compilable
from coca_scale.errors import UserError
from coca_scale.model import CoCa, load_model_config
from coca_scale.model.freeze import freeze
from coca_scale.model.layers import Block, BlockShape, Stack
from coca_scale.model.recompute import Linear, SelectiveRecompute
from coca_scale.model.targets import Targets
from tests.conftest import tiny_recipe
from tests.engine.batches import batch_of
from tests.ranks import on_ranks, quiet


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


def kept_and_found(compiled, selective, fp8=False):
    """Widths per token that three blocks in a row keep, their output and gradients."""
    torch.manual_seed(0)
    blocks = Stack(Block(BlockShape(64, 4, 4.0, 2, False)) for _ in range(3))
    for module in blocks.modules():
        if isinstance(module, SelectiveRecompute):
            module.selective = selective
        elif isinstance(module, Linear):
            module.fp8 = fp8
    if compiled:
        torch._dynamo.reset()
        compile_layers(blocks, blocks)
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


def test_products_in_fp8_are_kept_as_others_are():
    kept, expected = kept_and_found(compiled=False, selective=True, fp8=True)
    kept_compiled, found = kept_and_found(compiled=True, selective=True, fp8=True)
    # numbers between two of FP8 go here or there, by the last bit of what was before
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 5e-2 * b.norm()
    assert len(torch._dynamo.utils.counters["graph_break"]) == 0
    assert 10 < kept_compiled < kept < 11, (kept, kept_compiled)


def graphs_on_rank(_rank, _ranks, micro_batch, engine, two):
    """Graphs that there are after the first step, and after some of other lengths."""
    from coca_scale.engine.launch import start_world
    from coca_scale.engine.train_engine import TrainEngine
    from coca_scale.model import LogitScale
    from coca_scale.recipe import BatchSplit

    torch.compile = partial(torch.compile, backend="eager")  # graphs alone are made, and no code
    recipe = tiny_recipe(engine__compile="blocks", train__micro_batch=micro_batch, **engine)
    model, split = CoCa(load_model_config("coca_tiny")), BatchSplit.from_recipe(recipe, 1)
    with quiet():
        engine = TrainEngine(model, LogitScale(), recipe, split, start_world())
        counts = []
        for step in range(4):
            images, tokens = batch_of(step)
            tokens[:4] = tokens[4:8]  # a length of 1 is always a graph of its own
            targets = Targets(tokens.roll(step, 0), torch.rand(16) < 0.5) if two else None
            engine.step(images, engine.lay_out(tokens, targets), 1e-3)
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        engine.close()
    return counts


FP8 = {"engine__precision": "bf16", "engine__fp8": True}


@pytest.mark.parametrize(
    ("micro_batch", "engine", "graphs", "two"),
    [
        (16, {}, 5, False),
        (4, {}, 8, False),
        (4, FP8, 8, False),
        (4, {"engine__kept_graphs": 4}, 5, False),
        (4, {}, 8, True),  # rows of captions to write are rows like others
    ],
)
def test_captions_of_another_length_need_no_other_graph(micro_batch, engine, graphs, two):
    (counts,) = on_ranks(graphs_on_rank, 1, micro_batch, engine, two)
    # blocks of images, text, decoder and cross-attention, the pooler; the towers' in a first pass
    assert counts == [graphs] * 4
