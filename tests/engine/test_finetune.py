"""Locked towers, frozen heads, layer-wise decay, averaged weights, patch dropout, import memory."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from coca_scale.engine.checkpoint import find_checkpoint, read_weights
from coca_scale.engine.optimizer import make_optimizer
from coca_scale.errors import UserError
from coca_scale.model import CoCa, load_model_config
from coca_scale.model.freeze import freeze, layer_scales
from coca_scale.openclip.folder import write_folder
from tests.conftest import tiny_recipe
from tests.engine.batches import BATCH, batch_of
from tests.ranks import on_ranks, quiet, train_all
from tests.variants import config_file, variant, weights_of

CONTRASTIVE_ONLY = ("image.projection", "text.projection", "text.class_embedding")


def finetune_recipes(folder):
    """Runs from pretrained weights in which something has to stay as it is."""
    common = {
        "model__pretrained": str(folder / "start"),
        "data__val": None,
        "train__micro_batch": 4,
        "checkpoint__every_steps": 2,
        "optim__weight_decay": 0.5,
    }
    bf16 = {"engine__precision": "bf16"}
    return {
        "image": tiny_recipe(
            run__dir=str(folder / "image"),
            model__lock_image=True,
            engine__activation_checkpointing="full",
            **common,
        ),
        "image_bf16": tiny_recipe(
            run__dir=str(folder / "image_bf16"),
            model__lock_image=True,
            model__image_unlocked_groups=2,
            engine__activation_checkpointing="full",
            **common,
            **bf16,
        ),
        "text_stage1": tiny_recipe(
            run__dir=str(folder / "text_stage1"),
            model__lock_text=True,
            engine__zero_stage=1,
            **common,
            **bf16,
        ),
        "caption_only": tiny_recipe(
            run__dir=str(folder / "caption_only"), loss__contrastive_weight=0.0, **common
        ),
        "contrastive_only": tiny_recipe(
            run__dir=str(folder / "contrastive_only"), loss__caption_weight=0.0, **common
        ),
        "bn": tiny_recipe(
            **{**common, "model__pretrained": str(folder / "bn_start")},
            run__dir=str(folder / "bn"),
            model__name=str(folder / "timm_bn.json"),
            **bf16,
        ),
    }


def write_start(config, folder):
    torch.manual_seed(1)
    coca = CoCa(config)
    for name, buffer in coca.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    write_folder(weights_of(coca), config, folder)


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    write_start(load_model_config("coca_tiny"), folder / "start")
    config_file("timm_bn", folder)
    write_start(variant("timm_bn", folder), folder / "bn_start")
    recipes = list(finetune_recipes(folder).values())
    on_ranks(train_all, 2, recipes)

    for run in (
        "image_bf16",
        "bn",
    ):  # and again from the middle: constants come from the checkpoint
        shutil.rmtree(find_checkpoint(folder / run / "checkpoints"))
    shutil.rmtree(folder / "image")
    on_ranks(train_all, 2, recipes)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "constant", "trained"),
    [
        ("image", ("image.",), ("text.", "decoder.", "caption_head.")),
        (
            "image_bf16",
            (
                "image.patch",
                "image.class",
                *(f"image.blocks.{i}." for i in range(3)),
                "image.norm_pre",
            ),
            ("image.blocks.3.", "image.pooler", "image.norm_post", "image.projection", "text."),
        ),
        ("text_stage1", ("text.",), ("image.", "decoder.")),
        ("caption_only", CONTRASTIVE_ONLY, ("image.blocks", "text.blocks", "decoder.")),
        ("contrastive_only", ("decoder.", "caption_head."), ("image.", "text.")),
    ],
)
def test_what_is_locked_stays_bit_for_bit_and_the_rest_trains(finetuned, run, constant, trained):
    from coca_scale.openclip.folder import read_folder

    before = read_folder(finetuned / "start")[1]()
    for after in (
        read_weights(find_checkpoint(finetuned / run / "checkpoints")),
        read_folder(finetuned / run / "export")[1](),
    ):
        kept = [name for name in before if name.startswith(constant)]
        assert kept and all(torch.equal(after[name], before[name]) for name in kept)
        moved = [n for n in before if n.startswith(trained) and n not in kept]
        still = [n for n in moved if torch.equal(after[n], before[n])]
        assert moved and not still, still


@pytest.mark.slow
def test_batch_norm_statistics_survive_a_bf16_run(finetuned):
    from coca_scale.openclip.folder import read_folder

    before = read_folder(finetuned / "bn_start")[1]()
    after = read_folder(finetuned / "bn" / "export")[1]()
    statistics = [name for name in before if "running" in name]
    assert statistics and all(torch.equal(after[name], before[name]) for name in statistics)
    assert not torch.equal(after["image.projection"], before["image.projection"])


@pytest.mark.slow
def test_frozen_and_trained_evaluations_are_reported(finetuned, tmp_path):
    """Captioning alone: retrieval is measured before the first step and at the end."""
    from coca_scale.cli import app  # noqa: F401  (imports the whole tool once)

    recipe = finetune_recipes(finetuned)["caption_only"]
    raw = recipe.model_dump()
    raw["run"]["dir"] = str(tmp_path / "run")
    raw["data"]["val"] = "synthetic://shapes?split=val&count=8&size=48"
    output = on_ranks(run_and_read, 1, raw)[0]
    assert output.count("validation at step 0") == 1
    assert output.count("validation at step 4") == 1
    assert "starts from" in output and "parameters are locked" in output


def run_and_read(_rank, _ranks, raw):
    import io

    from coca_scale.recipe import recipe_from_dict
    from coca_scale.training.run import train_recipe

    error = io.StringIO()
    with quiet(), contextlib.redirect_stderr(error):
        folder = train_recipe(recipe_from_dict(raw))
    assert folder == Path(raw["run"]["dir"])
    return error.getvalue()


def locked(**model):
    coca = CoCa(load_model_config("coca_tiny"))
    recipe = tiny_recipe(**{f"model__{key}": value for key, value in model.items()})
    freeze(coca, recipe.model, recipe.loss)
    return {name for name, p in coca.named_parameters() if p.requires_grad}


def test_unlocked_groups_count_as_openclips():
    assert not any(name.startswith("image.") for name in locked(lock_image=True))
    one = locked(lock_image=True, image_unlocked_groups=1)
    assert {n for n in one if n.startswith("image.")} == {"image.projection"}
    two = locked(lock_text=True, text_unlocked_groups=2)
    text = {n for n in two if n.startswith("text.")}
    assert {"text.projection", "text.norm_final.weight", "text.blocks.1.norm1.weight"} <= text
    assert not any(n.startswith(("text.blocks.0", "text.token", "text.class")) for n in text)
    everything = locked(lock_image=True, image_unlocked_groups=6)
    assert everything == locked()
    with pytest.raises(UserError, match="this tower has 6 groups"):
        locked(lock_image=True, image_unlocked_groups=7)
    coca = CoCa(load_model_config("clip_tiny"))
    recipe = tiny_recipe(loss__contrastive_weight=0.0)
    with pytest.raises(UserError, match="nothing is left to train"):
        freeze(coca, recipe.model, recipe.loss)


@pytest.mark.parametrize("kind", ["coca", "base", "cascade", "roberta", "timm_vit", "timm_conv"])
def test_layer_groups_hold_every_parameter_once(kind, tmp_path):
    coca = CoCa(variant(kind, tmp_path))
    scales = layer_scales(coca, 0.5)
    assert scales.keys() == set(coca.parameters())
    groups = [*coca.image.layer_groups(), *coca.text.layer_groups(), *coca.decoder.layer_groups()]
    assert sum(len(group) for group in groups) + 1 == len(scales)


def test_layer_decay_is_the_learning_rate_of_the_group():
    coca = CoCa(load_model_config("coca_tiny"))
    recipe = tiny_recipe(optim__layer_decay=0.5)
    optimizer, rates = make_optimizer(coca, recipe.optim, recipe.loss)
    by_parameter = {
        id(p): rate.at({"contrastive": 1.0, "caption": 0.0})
        for group, rate in zip(optimizer.param_groups, rates, strict=True)
        for p in group["params"]
    }
    named = dict(coca.named_parameters())
    expected = {
        "image.projection": 1.0,
        "image.pooler.query": 0.5,
        "image.blocks.3.mlp.fc.weight": 0.5,
        "image.blocks.2.mlp.fc.weight": 0.25,
        "image.patch_embedding.weight": 0.5**5,
        "text.token_embedding.weight": 0.5**3,
        "decoder.cross_blocks.0.norm1.bias": 0.25,
        "caption_head.weight": 1.0,
    }
    assert {name: by_parameter[id(named[name])] for name in expected} == expected
    assert len(by_parameter) == len(named)


STEPS = 6


def average_on_rank(rank, ranks, layouts, folder):
    """Losses, and the averaged weights as a checkpoint gives them, of each layout."""
    from coca_scale.engine.launch import start_world
    from coca_scale.engine.train_engine import TrainEngine
    from coca_scale.model import LogitScale
    from coca_scale.recipe import BatchSplit

    world = start_world()
    curves = []
    for number, (stage, micro, lock) in enumerate(layouts):
        recipe = tiny_recipe(
            engine__zero_stage=stage,
            engine__activation_checkpointing="full" if lock and stage else "none",
            model__lock_image=lock,
            model__image_unlocked_groups=2 if lock else 0,
            train__micro_batch=micro,
            optim__ema_decay=0.5 if stage else None,
            optim__layer_decay=0.7,
            model__patch_dropout=0.5,
        )
        torch.manual_seed(0)
        config = load_model_config("coca_tiny").resized(patch_dropout=0.5)
        with quiet():
            plan = BatchSplit.from_recipe(recipe, ranks)
            coca = CoCa(config)
            freeze(coca, recipe.model, recipe.loss)
            engine = TrainEngine(coca, LogitScale(), recipe, plan, world)
            rows = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
            curve = []
            for step in range(STEPS):
                images, tokens = batch_of(step)
                result = engine.step(
                    images[rows], engine.lay_out(tokens[rows]), 1e-3, step * BATCH
                ).result()
                curve.append((result.loss, result.grad_norm))
                if stage:
                    target = folder / f"{ranks}_{number}_{step}"
                    if rank == 0:
                        target.mkdir()
                    world.barrier()
                    engine.save_state(target).result()
        engine.close()
        curves.append(curve)
    return curves


@pytest.mark.slow
def test_average_locks_and_patch_dropout_are_the_same_on_any_layout(tmp_path):
    free, locked = False, True
    layouts = [(3, 8, free), (3, 4, free), (1, 4, free), (2, 8, free), (3, 4, locked)]
    two = on_ranks(average_on_rank, 2, layouts, tmp_path)[0]
    one = on_ranks(average_on_rank, 1, [(0, 16, free), (0, 16, locked), (3, 4, free)], tmp_path)[0]
    references = [one[0]] * 4 + [one[1], one[0]]
    for curve, reference in zip([*two, one[2]], references, strict=True):
        for (loss, norm), (expected_loss, expected_norm) in zip(curve, reference, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-4)
    assert one[0][-1][0] != pytest.approx(one[1][-1][0], rel=1e-3)
    for layout in ("2_0", "2_1", "2_2", "2_3", "1_2"):
        torch.manual_seed(0)
        average = {
            n: t.clone() for n, t in CoCa(load_model_config("coca_tiny")).state_dict().items()
        }
        for step in range(STEPS):
            folder = tmp_path / f"{layout}_{step}"
            decay = min(0.5, (2 + step) / (11 + step))
            raw = read_weights(folder, raw=True)
            for name, tensor in average.items():
                tensor.lerp_(raw[name], 1 - decay)
            saved = read_weights(folder)
            for name, tensor in average.items():
                assert torch.allclose(saved[name], tensor, atol=1e-6), (layout, step, name)
        assert not torch.allclose(saved["image.projection"], raw["image.projection"], atol=1e-4)


def memory_on_rank(rank, _ranks, folder):
    """Bytes of memory of its own that a rank has after building a model from a file."""
    from coca_scale.engine.launch import start_world
    from coca_scale.model import ModelConfig
    from coca_scale.training.initial import find_start, initial_model

    recipe = tiny_recipe(model__name=str(folder / "big.json"), model__pretrained=str(folder / "w"))
    world = start_world()
    config = ModelConfig.from_recipe(recipe.model)
    before = own_memory()
    coca = initial_model(recipe, find_start(recipe, config, None, world), world, []).coca
    world.barrier()
    grown = own_memory() - before
    total = sum(p.numel() * 4 for p in coca.parameters())
    checksum = sum(float(p.detach().double().sum()) for p in coca.parameters())
    return grown, total, checksum


def own_memory():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


@pytest.mark.slow
def test_importing_maps_the_file_instead_of_copying_it(tmp_path):
    import json

    from tests.variants import raw_config

    raw = raw_config("coca_tiny", vision_cfg__width=1024, vision_cfg__layers=8)
    (tmp_path / "big.json").write_text(json.dumps(raw))
    config = load_model_config(str(tmp_path / "big.json"))
    write_start(config, tmp_path / "w")
    (tmp_path / "w" / "open_clip_pytorch_model.bin").unlink()
    found = on_ranks(memory_on_rank, 2, tmp_path)
    for grown, total, _ in found:
        assert total > 400e6
        assert grown < 0.25 * total
    assert found[0][2] == found[1][2]


def test_training_does_not_write_into_the_file_it_starts_from(tmp_path):
    from coca_scale.model.weights import build_model
    from coca_scale.openclip.weight_files import read_weight_file

    config = load_model_config("coca_tiny")
    torch.manual_seed(0)
    file = tmp_path / "w.safetensors"
    save_file(weights_of(CoCa(config)), file)
    before = file.read_bytes()
    model = build_model(config, read_weight_file(file))
    for parameter in model.coca.parameters():
        parameter.add_(1.0)
    assert file.read_bytes() == before
