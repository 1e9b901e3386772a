"""Tokens that are computed one after the other are those of the whole caption."""

from __future__ import annotations

import pytest
import torch

from coca_scale.errors import UserError
from coca_scale.model import CoCa
from tests.variants import CAPTIONERS, variant


@pytest.mark.parametrize("kind", CAPTIONERS)
@torch.no_grad()
def test_each_token_sees_what_it_sees_in_a_whole_caption(kind, tmp_path):
    config = variant(kind, tmp_path)
    torch.manual_seed(0)
    coca = CoCa(config).double().eval()
    size, hugging_face = config.vision_cfg.image_size, config.text.hf_model_name is not None
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    tokens = torch.randint(5, config.text.vocab_size, (4, 10))
    if not hugging_face:  # there, padding is no word
        tokens[1, 3] = tokens[3, 4] = tokens[3, 5] = config.pad_id
    _, image_tokens = coca.image(images)
    cache = coca.new_cache(12)
    found = [coca.next_logits(tokens[::2, :2], cache, image_tokens)]
    cache.repeat(2)
    tokens[1, :2], tokens[3, :2] = tokens[0, :2], tokens[2, :2]
    for column in range(2, 10):
        # the two captions of each image change positions, as beams do
        cache.take(torch.tensor([1, 0, 3, 2]))
        tokens[:, :column] = tokens[[1, 0, 3, 2], :column]
        found.append(coca.next_logits(tokens[:, column : column + 1], cache))
    expected = coca.caption_logits(image_tokens.repeat_interleave(2, 0), tokens)
    assert torch.allclose(found[0], expected[::2, 1], rtol=0, atol=1e-12)
    assert torch.allclose(found[-1], expected[:, 9], rtol=0, atol=1e-12)
    shorter = coca.caption_logits(image_tokens.repeat_interleave(2, 0), tokens[:, :9])
    assert not torch.allclose(shorter[:, -1], expected[:, -1])


def test_no_cache_is_longer_than_the_context(tmp_path):
    coca = CoCa(variant("coca", tmp_path))
    with pytest.raises(UserError, match="at most 16 tokens, 17 were asked for"):
        coca.new_cache(17)


@torch.no_grad()
def test_steps_have_the_same_shapes_so_that_one_compilation_serves_all(tmp_path):
    from torch._dynamo.testing import CompileCounter

    torch.manual_seed(0)
    coca = CoCa(variant("coca", tmp_path)).eval()
    images = torch.randn(2, 3, 48, 48)

    def write():
        cache = coca.new_cache(12)
        found = [coca.next_logits(torch.ones(2, 1, dtype=torch.long), cache, coca.image(images)[1])]
        cache.repeat(3)
        for token in range(5, 12):
            found.append(coca.next_logits(torch.full((6, 1), token), cache))
        return torch.cat(found)

    plain, counter = write(), CompileCounter()
    coca.text.forward = torch.compile(coca.text.forward, backend=counter, dynamic=False)
    coca.decoder.forward = torch.compile(coca.decoder.forward, backend=counter, dynamic=False)
    assert torch.allclose(write(), plain, rtol=0, atol=1e-5)
    assert counter.frame_count == 4  # both, for the first tokens and for one more
