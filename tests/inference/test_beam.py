"""Beam search writes what open_clip's main branch writes, without computing anything twice."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from coca_scale.inference.generate import generate
from coca_scale.inference.generation_options import GenerationOptions
from coca_scale.model import load_model_config
from coca_scale.model.weights import build_model
from coca_scale.openclip.state_dict import from_openclip
from tests.inference.reference import search
from tests.model.compare import open_clip_model

NAMES = {"seq_len": "max_length", "min_seq_len": "min_length", "samples": "num_return_sequences"}


def words(row: torch.Tensor, end_id: int) -> list[int]:
    """Tokens up to the first end; behind it, the two fill with different ids."""
    ids = row.tolist()
    return ids[: ids.index(end_id, 1) + 1] if end_id in ids[1:] else ids


def assert_same(coca, theirs, images, special, prompt=(), **changes: Any) -> list[list[int]]:
    """Compare, and return the best captions."""
    options = GenerationOptions(**changes)
    prompts = [[special.start_id, *prompt]] * len(images)
    mine = generate(coca, images, special, options, prompts=prompts)
    given = {"num_beams": 6, "min_seq_len": 5, "seq_len": mine.tokens_BNL.shape[2], **changes}
    asked = {NAMES.get(name, name): value for name, value in given.items()}
    tokens, scores = search(
        theirs, images, torch.tensor(prompts), special.end_id, special.pad_id, **asked
    )
    found = [words(row, special.end_id) for row in mine.tokens_BNL.flatten(0, 1)]
    assert found == [words(row, special.end_id) for row in tokens]
    assert torch.allclose(mine.scores_BN.flatten(), scores, rtol=0, atol=1e-4)
    return found[:: options.samples]


def random_pair(name: str, folder: Any, images: int) -> tuple[Any, ...]:
    """A random model with logits far apart, which ends some captions and not all."""
    config = load_model_config(name)
    theirs = open_clip_model(config, folder)
    with torch.no_grad():
        theirs.text_decoder.text_projection.mul_(5)
        theirs.text.token_embedding.weight.mul_(10)
    coca = build_model(config, from_openclip(theirs.state_dict())).coca
    torch.manual_seed(1)
    size = config.vision_cfg.image_size
    pictures = torch.randn(images, 3, size, size)
    special = SimpleNamespace(start_id=1, end_id=2, pad_id=config.text.pad_id)
    probe = generate(coca, pictures[:4], special, GenerationOptions("greedy", seq_len=12))
    special.end_id = int(probe.tokens_BNL[..., 1:].flatten().bincount().argsort()[-2])
    return coca, theirs, pictures, special


def test_200_pictures_of_a_trained_model(trained):
    found = assert_same(trained.coca, trained.theirs, trained.images, trained.tokenizer)
    assert len({tuple(row) for row in found}) > 10, "few pictures are told apart"
    assert min(len(row) for row in found) < max(len(row) for row in found)


def test_200_pictures_of_a_random_model(tmp_path):
    found = assert_same(*random_pair("coca_tiny", tmp_path, 200))
    assert len({len(row) for row in found}) > 1, "no caption ends early"


@pytest.mark.slow
def test_pictures_of_the_base_model(tmp_path):
    assert_same(*random_pair("coca_ViT-B-32", tmp_path, 2), seq_len=7)


@pytest.mark.long
def test_200_pictures_of_the_base_model(tmp_path):
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # nothing else runs
    coca, theirs, images, special = random_pair("coca_ViT-B-32", tmp_path, 200)
    for batch in images.split(8):
        assert_same(coca, theirs, batch, special, seq_len=8)
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    "options",
    [
        {"length_penalty": 0.0},
        {"length_penalty": 2.0, "num_beams": 3},
        {"early_stopping": True},
        {"repetition_penalty": 1.5},
        {"min_seq_len": 9, "seq_len": 12},
        {"samples": 3},
        {"num_beams": 2},
        {"prompt": (5, 77, 300)},
    ],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()),
)
def test_every_option(trained, options):
    assert_same(trained.coca, trained.theirs, trained.images[:24], trained.tokenizer, **options)


def test_prompts_of_several_lengths_are_each_continued_as_alone(trained):
    start = trained.tokenizer.start_id
    prompts = [[start], [start, 9, 40], [start, 8, 30, 77, 12]]
    images, special = trained.images[:3], trained.tokenizer
    for kind in ("beam_search", "greedy"):
        options = GenerationOptions(kind)
        together = generate(trained.coca, images, special, options, prompts=prompts)
        for number, prompt in enumerate(prompts):
            one = slice(number, number + 1)
            alone = generate(trained.coca, images[one], special, options, prompts=[prompt])
            assert torch.equal(together.tokens_BNL[one], alone.tokens_BNL)
            assert torch.allclose(together.scores_BN[one], alone.scores_BN, rtol=0, atol=1e-5)
            assert together.tokens_BNL[number, 0, : len(prompt)].tolist() == prompt


def test_groups_without_penalty_search_alike_and_with_one_avoid_each_other(trained):
    images, special = trained.images[:16], trained.tokenizer
    narrow = GenerationOptions(num_beams=2, samples=1)
    groups = GenerationOptions(num_beams=6, num_beam_groups=3, samples=3)
    few = generate(trained.coca, images, special, narrow)
    alike = generate(trained.coca, images, special, groups)
    for number in range(3):
        assert torch.equal(alike.tokens_BNL[:, number], few.tokens_BNL[:, 0])
    apart = GenerationOptions(num_beams=3, num_beam_groups=3, samples=3, diversity_penalty=1e4)
    diverse = generate(trained.coca, images, special, apart).tokens_BNL
    first = diverse[:, :, 1]
    assert all(len(set(row)) == 3 for row in first.tolist()), "groups began with the same word"


def test_running_on_changes_nothing(trained):
    """As under ZeRO-3, where ranks whose captions have ended go on with the others."""
    for kind in ("beam_search", "greedy"):
        options = GenerationOptions(kind)
        args = (trained.coca, trained.images[:16], trained.tokenizer, options)
        stopped, ran_on = generate(*args), generate(*args, same_steps=True)
        assert torch.equal(stopped.tokens_BNL, ran_on.tokens_BNL)
        assert torch.equal(stopped.scores_BN, ran_on.scores_BN)
