"""Two captions per picture under DeepSpeed: losses and gradients of two plain passes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from coca_scale.model import CoCa, load_model_config
from coca_scale.model.targets import Targets
from tests.conftest import tiny_recipe
from tests.engine.batches import BATCH, batch_of
from tests.ranks import on_ranks, quiet

CONTRASTIVE, CAPTION = 1.0, 2.0
COCA, MAMMUT, MODERN = "coca_tiny", "mammut2_tiny", "coca2-moderntext_tiny"
CASES = {
    1: [
        {"train__micro_batch": 4, "engine__activation_checkpointing": "full"},
        {"train__micro_batch": 16, "engine__zero_stage": 1},
    ],
    2: [
        {"train__micro_batch": 2},
        {"train__micro_batch": 2, "engine__kept_graphs": 2},
        {"train__micro_batch": 4, "engine__zero_stage": 2},
        {
            "train__micro_batch": 8,
            "engine__deepspeed": {"zero_optimization": {"stage3_max_reuse_distance": 0}},
        },
        # whose one text tower runs twice
        {"train__micro_batch": 2, "model__name": MAMMUT},
        {"train__micro_batch": 8, "model__name": MAMMUT, "engine__zero_stage": 2},
        {
            "train__micro_batch": 4,
            "model__name": MAMMUT,
            "engine__kept_graphs": 1,
            "engine__activation_checkpointing": "full",
            "engine__deepspeed": {"zero_optimization": {"stage3_max_reuse_distance": 0}},
        },
        {"train__micro_batch": 4, "model__name": MAMMUT, "engine__offload": "optimizer"},
        {"train__micro_batch": 4, "model__name": MODERN},
    ],
}


def captions_of(step):
    """Of all ranks: pictures, what they are matched to, what is written, some of it in parallel."""
    images, tokens = batch_of(step)
    written = batch_of(step + 100)[1].roll(3, 0)
    written[9] = tokens[9]
    return images, tokens, Targets(written, torch.arange(BATCH) % 3 == 1)


def model(name):
    torch.manual_seed(0)
    return CoCa(load_model_config(name))


def gradients_on_rank(rank, ranks, cases):
    """Losses of a step, norm of its gradients, and under ZeRO-3 those that AdamW has seen."""
    from coca_scale.engine.launch import start_world

    with quiet():
        world = start_world()
        return [_gradients(rank, ranks, world, changes) for changes in cases]


def _gradients(rank, ranks, world, changes):
    from deepspeed.utils import safe_get_full_optimizer_state

    from coca_scale.engine.train_engine import TrainEngine
    from coca_scale.model import LogitScale
    from coca_scale.recipe import BatchSplit

    recipe = tiny_recipe(optim__clip_norm=0.0, optim__beta1=0.5, **changes)
    split = BatchSplit.from_recipe(recipe, ranks)
    engine = TrainEngine(model(recipe.model.name), LogitScale(), recipe, split, world)
    images, tokens, targets = captions_of(0)
    here = torch.arange(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    captions = engine.lay_out(tokens[here], targets[here])
    result = engine.step(images[here], captions, 1e-3).result()
    found = (
        {}
        if recipe.engine.zero_stage < 3
        else {
            name: safe_get_full_optimizer_state(parameter, "exp_avg") / 0.5
            for name, parameter in engine.module.named_parameters()
        }
    )
    engine.close()
    return result.losses, result.grad_norm, found


@pytest.fixture(scope="module")
def expected():
    """By the name of a model, from two passes of it in float64, with all padding."""
    return {name: plainly(name) for name in (COCA, MAMMUT, MODERN)}


def plainly(name):
    """Losses and gradients of the whole batch."""
    from coca_scale.model import LogitScale
    from coca_scale.model.image import normalize_pixels

    coca, scale = model(name).double(), LogitScale().double()()
    config = coca.config
    images, tokens, targets = captions_of(0)
    pictures = normalize_pixels(images, torch.float64, config.preprocess_cfg)
    image_tokens = coca.image(pictures)[1]
    logits = scale * coca.encode_image(pictures) @ coca.encode_text(tokens).T
    own = torch.arange(BATCH)
    contrastive = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    inputs = targets.tokens_BT.clone()
    for row in range(1, BATCH, 3):
        inputs[row, inputs[row] != 0] = inputs[row, 0]
    written = coca.caption_logits(image_tokens, inputs)[:, :-1].transpose(1, 2)
    caption = F.cross_entropy(written, targets.tokens_BT[:, 1:], ignore_index=0)
    (CONTRASTIVE * contrastive + CAPTION * caption).backward()
    gradients = {name: parameter.grad for name, parameter in coca.named_parameters()}
    return {"contrastive": contrastive.item(), "caption": caption.item()}, gradients


@pytest.mark.parametrize("ranks", CASES)
def test_gradients_are_those_of_two_passes_on_one_machine(ranks, expected):
    for found in on_ranks(gradients_on_rank, ranks, CASES[ranks]):
        for case, (of_it, norm, tensors) in zip(CASES[ranks], found, strict=True):
            losses, gradients = expected[case.get("model__name", COCA)]
            for name, value in losses.items():
                assert of_it[name] == pytest.approx(value, rel=2e-6), (case, name)
            whole = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
            assert norm == pytest.approx(whole.item(), rel=1e-5), case
            seen = () if "engine__zero_stage" in case else gradients
            assert set(tensors) == set(seen)
            for name, tensor in tensors.items():
                error = (tensor.double() - gradients[name]).norm() / gradients[name].norm()
                assert error < 2e-5, (case, name, error)
