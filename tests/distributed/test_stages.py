"""Runs in stages: stopped, killed and resharded around their boundaries, they stay one run."""

from __future__ import annotations

import shutil
import time
import weakref
from pathlib import Path

import pytest
import torch

from coca_scale.engine.checkpoint import read_weights
from coca_scale.model import CoCa, load_model_config
from coca_scale.model.weights import LOGIT_BIAS, LOGIT_SCALE
from tests.conftest import tiny_recipe
from tests.json_lines import curve, lines_of
from tests.ranks import TrainingRanks, on_ranks, quiet

# 4 × 16 + 3 × 24 + 3 × 8 + 2 × 16 = 192 samples: an epoch of them
STAGES = [
    {"steps": 4, "image_size": 24, "context_length": 12, "lock_text": True, "lr_factor": 0.5},
    {"steps": 3, "global_batch": 24, "image_size": 36, "patch_dropout": 0.25},
    {"samples": 24, "global_batch": 8, "caption_weight": 0.0, "lr": 5e-4},
    {"steps": 2, "micro_batch": 2, "crop_scale_min": 0.9},
]
STEPS, BOUNDARIES = 12, (4, 7, 10)


def staged(folder, **changes):
    return tiny_recipe(
        **{
            "run__dir": str(folder),
            "data__train": "synthetic://shapes?count=192&size=48",
            "optim__ema_decay": 0.9,
            "optim__layer_decay": 0.9,
            "schedule__warmup_steps": 3,
            "schedule__stages": STAGES,
            "train__steps": None,
            "train__micro_batch": 4,
            "data__lanes": 4,
            "checkpoint__keep": None,
            **changes,
        }
    )


def part_of_a_run(rank, ranks, folder, until, changes):
    """Train on from what is in `folder` and leave after step `until`; keys of every step."""
    from coca_scale.engine.launch import end_world, start_world
    from coca_scale.engine.watchdog import NoWatchdog
    from coca_scale.training import run
    from coca_scale.training.requests import Asked, Requests

    keys, notes, at, models = {}, [], [0], []

    class Watched(run.Trainer):
        def _train(self, *args):
            assert not any(model() for model in models), "of a stage before, still in memory"
            models.append(weakref.ref(self.engine.module))
            notes.extend(self.setup.notes)
            at[0] = self.step
            return super()._train(*args)

        def _train_step(self, batch):
            super()._train_step(batch)
            at[0] = self.step
            keys[self.step] = batch.share.keys

    Requests.poll = lambda _: Asked(leave=at[0] >= until)
    run.Trainer = Watched
    with quiet():
        world = start_world(60)
        code = run._train_stages(staged(folder, **changes), world, NoWatchdog())
        end_world()
    return code, keys, notes


def allocate(folder, ranks, until, **changes):
    """One allocation; keys of all ranks by step, notes of rank 0."""
    results = on_ranks(part_of_a_run, ranks, str(folder), until, changes)
    assert {code for code, _, _ in results} == {0 if until >= STEPS else 75}
    keys = {step: sorted(k for _, ks, _ in results for k in ks[step]) for step in results[0][1]}
    return keys, results[0][2]


def weights(folder):
    from coca_scale.engine.checkpoint import find_checkpoint

    return read_weights(find_checkpoint(Path(folder) / "checkpoints"))


def assert_same_run(folder, other):
    assert curve(folder, STEPS) == curve(other, STEPS)
    expected = weights(other)
    for name, value in weights(folder).items():
        assert value.equal(expected[name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    keys, notes = allocate(folder, 2, STEPS)
    return folder, keys, notes


def test_a_run_in_stages_sees_every_sample_of_an_epoch_once(whole):
    folder, keys, notes = whole
    seen = [key for step in keys.values() for key in step]
    assert len(seen) == len(set(seen)) == 192
    assert [len(keys[step]) for step in keys] == [16] * 4 + [24] * 3 + [8] * 3 + [16] * 2
    lines = lines_of(folder / "metrics.jsonl")
    assert [line["stage"] for line in lines] == [1] * 4 + [2] * 3 + [3] * 3 + [4] * 2
    assert [line["samples_seen"] for line in lines] == [
        *(16, 32, 48, 64, 88, 112, 136, 144, 152, 160, 176, 192)
    ]
    assert [line["global_batch"] for line in lines] == [16] * 4 + [24] * 3 + [8] * 3 + [16] * 2
    told = [note for note in notes if "begins" in note]
    assert len(told) == 3
    assert "; a schedule begins, of lr 0.0005; " in told[1] and "lr" not in told[0] + told[2]
    assert told[0].startswith("stage 2 of 4 begins: image_size 24 → 36; context_length 12 → 16; ")


def test_the_learning_rate_follows_the_stages(whole):
    rates = [line["lr"] for line in lines_of(whole[0] / "metrics.jsonl")]
    assert rates[:3] == pytest.approx([1e-3 / 6, 1e-3 / 3, 1e-3 / 2])  # half of a warm-up
    assert rates[3] == pytest.approx(0.5e-3)  # half of the peak of a cosine of 7 steps
    assert rates[4:7] == pytest.approx([1e-3 * 0.853553, 1e-3 * 0.5, 1e-3 * 0.146447], rel=1e-4)
    assert rates[7] == 5e-4  # of a schedule of its own, which the last stage goes on with
    assert rates[10] == pytest.approx(5e-4 * 0.345492, rel=1e-4)


def state(checkpoint):
    """Weights, their average and moments of a checkpoint, all whole."""
    from coca_scale.engine.zero_slices import SavedState

    saved = SavedState(checkpoint)
    moments = {
        name: [saved.whole(name, key).flatten() for key in ("exp_avg", "exp_avg_sq")]
        for name in saved.shapes
    }
    return read_weights(checkpoint, raw=True), read_weights(checkpoint), moments


def test_a_stage_begins_with_what_the_one_before_has_left(whole, tmp_path):
    from coca_scale.model.weights import fit_weights

    allocate(tmp_path / "run", 2, BOUNDARIES[0])  # the second stage begins, and leaves
    name = f"checkpoints/step_{BOUNDARIES[0]:08d}"
    before = state(whole[0] / name)
    after = state(tmp_path / "run" / name)
    config = load_model_config("coca_tiny").resized(image_size=36)
    for old, new in zip(before[:2], after[:2], strict=True):
        expected, notes = fit_weights(old, config)
        assert len(notes) == 2, "positions of images and of captions"
        for key, value in new.items():
            assert value.equal(expected[key]), key
    assert not any(key.startswith("text.") for key in before[2]), "locked"
    begins_anew = {key for key in after[2] if key.startswith("text.")} | {
        "image.position_embedding"
    }
    for key, moments in after[2].items():
        if key in begins_anew:
            assert not any(moment.any() for moment in moments), key
        else:
            assert all(map(torch.equal, moments, before[2][key])), key
            assert all(moment.any() for moment in moments), key


def test_the_export_is_of_the_last_stage(whole):
    from coca_scale.inference.load import load_model

    loaded = load_model(str(whole[0] / "export"))
    assert (loaded.config.vision_cfg.image_size, loaded.config.context_length) == (48, 16)


@pytest.mark.slow
def test_stopped_at_boundaries_or_beside_them_it_is_the_same_to_the_bit(whole, tmp_path):
    folder, seen = tmp_path / "run", {}
    for until in (3, 7, 11, STEPS):
        seen |= allocate(folder, 2, until)[0]
    assert seen == whole[1]
    assert_same_run(folder, whole[0])


@pytest.mark.slow
def test_other_ranks_and_zero_stages_across_boundaries(whole, tmp_path):
    folder, seen = tmp_path / "run", {}
    for ranks, stage, until in ((2, 3, 3), (4, 2, 5), (1, 1, 7), (2, 3, 8), (1, 3, STEPS)):
        seen |= allocate(folder, ranks, until, engine__zero_stage=stage, train__micro_batch=2)[0]
    assert seen == whole[1]
    for changed, expected in zip(curve(folder, STEPS), curve(whole[0], STEPS), strict=True):
        assert changed == pytest.approx(expected, rel=1e-3)
    expected = weights(whole[0])
    for name, value in weights(folder).items():
        assert value.allclose(expected[name], rtol=1e-3, atol=1e-4), name


MOVING = {
    "schedule__stages": [
        {"steps": 5},
        {"steps": 7, "contrastive_weight": {0: 1.0, 1: 0.0, 3: 0.0, 5: 2.0}},
    ],
    "loss__caption_weight": {"25%": 2.0, "75%": 1.0},
    "loss__contrastive": "sigmoid",
}


@pytest.mark.slow
def test_weights_of_losses_move_and_pause_what_they_alone_train(tmp_path):
    straight, stopped, other = (tmp_path / name for name in ("straight", "stopped", "other"))
    allocate(straight, 2, STEPS, **MOVING)
    lines = lines_of(straight / "metrics.jsonl")
    assert [line["contrastive_weight"] for line in lines] == [1.0] * 6 + [0.0] * 3 + [1.0, 2.0, 2.0]
    caption = [2.0] * 4 + [2 - n / 6 for n in range(1, 6)] + [1.0] * 3
    assert [line["caption_weight"] for line in lines] == pytest.approx(caption)
    for line in lines:
        losses = ("contrastive", "caption")
        total = sum(line[f"{name}_weight"] * line[f"{name}_loss"] for name in losses)
        assert line["loss"] == pytest.approx(total)

    allocate(stopped, 2, 7, **MOVING)  # after one step of the pause
    shutil.copytree(stopped, other)
    for until in (9, STEPS):
        allocate(stopped, 2, until, **MOVING)
    assert_same_run(stopped, straight)
    first, last = (
        read_weights(stopped / f"checkpoints/step_{step:08d}", raw=True) for step in (7, 9)
    )
    still = {name for name in first if first[name].equal(last[name])}
    coca = CoCa(load_model_config("coca_tiny"))
    alone = coca.image.contrastive_parameters() + coca.text.contrastive_parameters()
    names = {name for name, p in coca.named_parameters() if any(p is other for other in alone)}
    assert still - coca.state_dict().keys() == {LOGIT_SCALE, LOGIT_BIAS}
    assert still & dict(coca.named_parameters()).keys() == names
    end = weights(stopped)
    assert not any(end[name].equal(first[name]) for name in names)

    allocate(other, 1, STEPS, **MOVING, engine__zero_stage=1)
    for changed, expected in zip(curve(other, STEPS), curve(straight, STEPS), strict=True):
        assert changed == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_in_bf16_on_one_rank(tmp_path, zero_stage):
    layout = {"engine__precision": "bf16", "engine__zero_stage": zero_stage}
    for name, stops in (("straight", (STEPS,)), ("stopped", (4, STEPS))):
        for until in stops:
            allocate(tmp_path / name, 1, until, **layout)
    assert_same_run(tmp_path / "stopped", tmp_path / "straight")


WORDS = ("stage 1 of 4 ends", "stage 2 of 4 begins", "saved step_00000007")


@pytest.mark.slow
def test_killed_around_boundaries_it_is_the_same_to_the_bit(whole, tmp_path):
    folder, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    from coca_scale.recipe import dump_recipe

    recipe.write_text(dump_recipe(staged(folder, checkpoint__every_steps=2)))
    for number, word in enumerate((*WORDS, None)):
        job = TrainingRanks(tmp_path / f"{number}.log", "--recipe", str(recipe))
        if word is None:
            assert job.wait() == 0
            break
        while word not in job.output:
            assert job.alive, job.output[-3000:]
            time.sleep(0.005)
        job.kill()
    assert_same_run(folder, whole[0])
