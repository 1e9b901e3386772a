"""What tokens are drawn from, and how."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from coca_scale.errors import UserError
from coca_scale.inference.generate import generate
from coca_scale.inference.generation_options import GenerationOptions
from coca_scale.inference.scores import draw, probabilities

END = 7


def of_transformers(logits: torch.Tensor, tokens: torch.Tensor, options: GenerationOptions):
    """The chain that transformers builds for sampling, in its order."""
    chain: list[Any] = [RepetitionPenaltyLogitsProcessor(options.repetition_penalty)]
    chain.append(MinLengthLogitsProcessor(options.min_seq_len, END))
    chain.append(TemperatureLogitsWarper(options.temperature))
    if options.generation_type == "top_k":
        chain.append(TopKLogitsWarper(options.top_k))
    else:
        chain.append(TopPLogitsWarper(options.top_p))
    return LogitsProcessorList(chain)(tokens, logits).softmax(-1)


@pytest.mark.parametrize(
    "options",
    [
        {"generation_type": "top_k", "top_k": 1},
        {"generation_type": "top_k", "top_k": 40, "temperature": 0.7},
        {"generation_type": "top_k", "top_k": 1000, "min_seq_len": 9},
        {"generation_type": "top_p", "top_p": 0.1},
        {"generation_type": "top_p", "top_p": 0.9, "temperature": 1.4},
        {"generation_type": "top_p", "top_p": 1.0, "repetition_penalty": 1.7},
    ],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()),
)
def test_the_distribution_is_that_of_transformers(options):
    torch.manual_seed(0)
    logits = (3 * torch.randn(64, 500)).double()
    tokens = torch.randint(0, 500, (64, 8))
    chosen = GenerationOptions(**options)
    found = probabilities(logits, tokens, chosen, END)
    expected = of_transformers(logits, tokens, chosen)
    assert torch.equal(found > 0, expected > 0)
    assert torch.allclose(found, expected, rtol=1e-9, atol=0)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    torch.manual_seed(0)
    chances = torch.randn(1, 50).double().softmax(-1)
    chances[0, 10:30] = 0
    chances /= chances.sum()
    count = 200_000
    drawn = draw(chances.expand(count, -1), torch.rand(count, dtype=torch.float64))
    often = drawn.bincount(minlength=50) / count
    spread = (chances[0] * (1 - chances[0]) / count).sqrt()
    assert not often[10:30].any()
    assert ((often - chances[0]).abs() <= 5 * spread).all()


def test_an_image_draws_the_same_in_any_batch(trained):
    options = GenerationOptions("top_p", top_p=0.95, samples=3, seed=5)
    args = (trained.tokenizer, options)
    together = generate(trained.coca, trained.images[:6], *args, seeds=[10, 11, 12, 13, 14, 15])
    part = generate(trained.coca, trained.images[4:6], *args, seeds=[14, 15])
    assert torch.equal(together.tokens_BNL[4:6], part.tokens_BNL)
    other = GenerationOptions("top_p", top_p=0.95, samples=3, seed=6)
    redrawn = generate(trained.coca, trained.images[:6], trained.tokenizer, other)
    assert not torch.equal(redrawn.tokens_BNL, together.tokens_BNL)
    assert any(len(set(map(tuple, image.tolist()))) > 1 for image in together.tokens_BNL)


def test_one_of_one_is_greedy_and_scores_are_log_probabilities(trained):
    images, special = trained.images[:12], trained.tokenizer
    greedy = generate(trained.coca, images, special, GenerationOptions("greedy"))
    top_1 = generate(trained.coca, images, special, GenerationOptions("top_k", top_k=1))
    one_beam = generate(trained.coca, images, special, GenerationOptions(num_beams=1))
    assert torch.equal(greedy.tokens_BNL, top_1.tokens_BNL)
    assert torch.equal(greedy.tokens_BNL, one_beam.tokens_BNL)
    assert torch.allclose(greedy.scores_BN, one_beam.scores_BN, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generation_type": "beams"}, "one of beam_search, greedy, top_k, top_p"),
        ({"num_beams": 4, "num_beam_groups": 3}, "multiple of num_beam_groups"),
        ({"samples": 7}, "cannot be more than num_beams"),
        ({"generation_type": "greedy", "samples": 2}, "one caption per image"),
        ({"temperature": 0.0}, "temperature is more than 0"),
        ({"top_p": 1.5}, "between 0 and 1"),
        ({"seq_len": 5}, "min_seq_len .5. must be less than seq_len .5."),
        ({"seq_len": 1}, "at least 2"),
        ({"top_k": 0}, "at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        GenerationOptions(**options)


def test_defaults_are_those_of_open_clip():
    import inspect

    from open_clip.coca_model import CoCa

    theirs = inspect.signature(CoCa.generate).parameters
    mine = GenerationOptions()
    shared = [name for name in vars(mine) if name in theirs]
    assert len(shared) == 9
    different = {n for n in shared if getattr(mine, n) != theirs[n].default}
    # groups fall back to one in its main branch; None means 30 where the context allows it
    assert different == {"num_beam_groups", "seq_len"}
    assert mine.length(77) == theirs["seq_len"].default
    assert GenerationConfig().num_beam_groups in (None, 1)
