"""Towers that run once in a step, in whose graphs the second pass goes on."""

from __future__ import annotations

import json
from dataclasses import replace

import torch

from tests.conftest import tiny_recipe
from tests.engine.batches import BATCH, batch_of
from tests.ranks import on_ranks, quiet
from tests.variants import config_file

STEPS, MICRO_BATCHES = 2, 4


def engine_on(rank, ranks, world, changes):
    from coca_scale.engine.train_engine import TrainEngine
    from coca_scale.model import CoCa, LogitScale, ModelConfig
    from coca_scale.model.freeze import freeze
    from coca_scale.recipe import BatchSplit

    recipe = tiny_recipe(train__micro_batch=BATCH // ranks // MICRO_BATCHES, **changes)
    if recipe.engine.secondary_shard:
        world = replace(world, hosts=tuple(f"node{number // 2}" for number in range(ranks)))
    torch.manual_seed(0)
    model = CoCa(ModelConfig.from_recipe(recipe.model))
    freeze(model, recipe.model, recipe.loss)
    return TrainEngine(model, LogitScale(), recipe, BatchSplit.from_recipe(recipe, ranks), world)


def run(engine, rank, ranks, step):
    rows = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    images, tokens = (whole[rows] for whole in batch_of(step))
    tokens = tokens.clamp(max=engine.module.config.text.vocab_size - 1)
    return engine.step(images, engine.lay_out(tokens), 1e-3).result()


def curves_on_rank(rank, ranks, cases):
    """Loss, gradient norm and logit scale of every step, and what the weights are in the end."""
    from coca_scale.engine.launch import start_world

    with quiet():
        world = start_world()
        return [_curve(rank, ranks, world, changes) for changes in cases]


def _curve(rank, ranks, world, changes):
    engine = engine_on(rank, ranks, world, changes)
    results = [run(engine, rank, ranks, step) for step in range(STEPS)]
    engine.evaluate()  # which makes DeepSpeed forget the order
    size = engine.module.config.vision_cfg.image_size
    with torch.no_grad():
        engine.module.encode_image(engine.prepare(torch.zeros(1, 3, size, size)))
    results += [run(engine, rank, ranks, step) for step in range(STEPS, STEPS + 2)]
    curve = [(result.loss, result.grad_norm, result.logit_scale) for result in results]
    assert all(result.applied for result in results)
    weights = [float(w.detach().double().norm()) for w in engine._zero.own_weights().values()]
    engine.close()
    return curve, weights


LET_GO = {"engine__deepspeed": {"zero_optimization": {"stage3_max_reuse_distance": 0}}}
DEEPSPEEDS = {"engine__offload": "optimizer"}  # which gathers layers itself then
FULL = {"engine__activation_checkpointing": "full"}


def kinds_of(folder):
    """What is trained on two ranks, each with another number of graphs."""
    raw = json.loads(config_file("roberta", folder).read_text())
    vision = json.loads(config_file("timm_vit", folder).read_text())["vision_cfg"]
    (folder / "others.json").write_text(json.dumps({**raw, "vision_cfg": vision}))
    others = {"model__name": str(folder / "others.json"), "model__pretrained_towers": False}
    return [
        ({}, (1, 2, 9)),
        ({"engine__zero_stage": 2}, (2,)),
        ({"engine__precision": "bf16", **LET_GO}, (4,)),
        ({"engine__offload": "all", **FULL, **LET_GO}, (2,)),
        ({"model__patch_dropout": 0.5, "model__lock_text": True, **FULL}, (2,)),
        ({"model__name": "clip_tiny"}, (2,)),
        ({**others, **LET_GO}, (2,)),
    ]


def assert_equal_curves(ranks, kinds):
    cases = [
        {**changes, "engine__kept_graphs": number}
        for changes, numbers in kinds
        for number in (0, *numbers)
    ]
    for found in on_ranks(curves_on_rank, ranks, cases):
        reference = None
        for case, curve in zip(cases, found, strict=True):
            if case["engine__kept_graphs"] == 0:
                reference = curve
            assert curve == reference, case


def test_whatever_is_kept_the_curve_is_the_same_to_the_bit(tmp_path):
    assert_equal_curves(2, kinds_of(tmp_path))


def test_so_it_is_on_one_rank():
    assert_equal_curves(1, [({}, (1, 4)), ({"engine__zero_stage": 2}, (3,))])


class Gathers:
    """Elements that are gathered in a step: when they are needed, and ahead of that.

    Beside these how often DeepSpeed forgets the order of modules, and of how many at most it misses
    the end of the backward pass.
    """

    def __init__(self, zero):
        self.needed = self.ahead = self.missed = self.forgotten = 0
        coordinator = zero._engine.optimizer.parameter_offload.get_param_coordinator()
        name = f"_{type(coordinator).__name__}__"
        self._watch(coordinator, f"{name}all_gather_params", self._of_deepspeed)
        self._watch(getattr(coordinator, f"{name}profiler"), "start_event", self._note)
        self._watch(coordinator, "_invalidate_trace", self._forget)
        self._running = getattr(coordinator, f"{name}active_backward_submodules")
        self._watch(coordinator, "release_backward_leftovers", self._miss)
        if zero._many is not None:
            self._watch(zero._many._layers, "_fetch", self._use)
            self._watch(zero._many._layers, "_gather", self._of_ours)

    def _watch(self, owner, name, seen):
        original = getattr(owner, name)

        def watched(*args):
            seen(*args)
            return original(*args)

        setattr(owner, name, watched)

    def _note(self, event):
        self._event = event

    def _of_deepspeed(self, parameters, _):
        there = sum(p.ds_numel for p in parameters if p.ds_status.name == "NOT_AVAILABLE")
        if "PREFETCH" in self._event.upper():
            self.ahead += there
        else:
            self.needed += there

    def _forget(self):
        self.forgotten += 1

    def _miss(self):
        self.missed = max(self.missed, len(self._running))

    def _use(self, layer, _):
        self._used = layer

    def _of_ours(self, layer):
        if layer.in_flight is None:
            there = sum(p.ds_numel for p in layer.parameters if p.ds_status.name == "NOT_AVAILABLE")
            if layer is self._used:
                self.needed += there
            else:
                self.ahead += there


def gathers_on_rank(rank, ranks, cases):
    from coca_scale.engine.launch import start_world

    with quiet():
        world = start_world()
        return [_gathers(rank, ranks, world, changes) for changes in cases]


def _gathers(rank, ranks, world, changes):
    engine = engine_on(rank, ranks, world, changes)
    for step in range(3):  # in which the order is learnt
        run(engine, rank, ranks, step)
    gathers = Gathers(engine._zero)
    run(engine, rank, ranks, 3)
    engine.close()
    return gathers.needed, gathers.ahead, gathers.missed, gathers.forgotten


def test_weights_are_gathered_ahead_and_less_often():
    cases = [
        {**changes, "engine__kept_graphs": number}
        for changes in ({}, LET_GO, DEEPSPEEDS)
        for number in (0, 2)
    ]
    found = on_ranks(gathers_on_rank, 2, cases)[0]
    for case, (needed, ahead, missed, forgotten) in zip(cases, found, strict=True):
        print(f"{case}: {needed:,} when they are needed, {ahead:,} ahead")
        assert forgotten == 0, case
        assert needed < ahead, case
        if case["engine__kept_graphs"] == 0:
            before = (needed, ahead, missed)
        else:
            assert needed < before[0], case
            assert ahead < before[1], case
            assert missed <= before[2], case
