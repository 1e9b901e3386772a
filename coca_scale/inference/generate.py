"""Captions of images, each token computed once.

open_clip computes every earlier token, and the image tokens' keys and values for every beam, anew
at each step. Here the image is encoded once, its keys and values are shared by its beams, and text
tower and decoder keep those of earlier tokens (`model/kv_cache.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from coca_scale.errors import UserError
from coca_scale.inference.beam import BeamSearch
from coca_scale.inference.generation_options import GenerationOptions
from coca_scale.inference.prompts import make_prompts
from coca_scale.inference.sampling import Sampling
from coca_scale.model import CoCa


class SpecialTokens(Protocol):
    """The part of a tokenizer that is needed here."""

    start_id: int
    end_id: int
    pad_id: int


@dataclass(frozen=True)
class Generated:
    """What was written.

    Attributes:
        tokens_BNL: int64 [B, samples, L]: start token, words, end token, padding. A caption that
            reached the most tokens has no end token.
        scores_BN: fp32, log-probability of what follows the prompt, over its length to the power
            of `length_penalty`.
    """

    tokens_BNL: Tensor
    scores_BN: Tensor


@torch.no_grad()
def generate(
    coca: CoCa,
    images: Tensor,
    special: SpecialTokens,
    options: GenerationOptions,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    seeds: Sequence[int] | None = None,
    same_steps: bool = False,
) -> Generated:
    """Write captions.

    Args:
        coca: the model, in evaluation mode.
        images: normalised images [B, 3, H, W].
        special: ids of the special tokens.
        options: how.
        prompts: tokens that each caption begins with, the start token first; by default that alone.
        seeds: one per image, for drawing; by default its index in the batch.
        same_steps: run the model as often as for the longest caption, whatever it writes. Needed
            under ZeRO-3, where every rank must run it the same number of times.

    Raises:
        UserError: the model has no decoder, no place for the captions asked for, or gives NaN.
    """
    length = options.length(coca.config.context_length)
    cache = coca.new_cache(length)
    given = [[special.start_id]] * len(images) if prompts is None else prompts
    begun = make_prompts(given, length, special.end_id, special.pad_id, images.device)
    search: BeamSearch | Sampling
    if options.generation_type == "beam_search":
        search = BeamSearch(begun, options)
    else:
        search = Sampling(begun, options, seeds)
    _, image_tokens_BSD = coca.image(images)
    logits = coca.next_logits(begun.tokens_BL[:, : begun.shortest], cache, image_tokens_BSD)
    finite = logits.isfinite().all()  # read at the end: the host would wait at every token
    cache.repeat(search.rows_per_image)
    logits = logits.repeat_interleave(search.rows_per_image, 0)
    for position in range(begun.shortest, length):
        rows = search.advance(logits, position)
        last = position + 1 == length
        if last or (search.finished and not same_steps):
            break
        if rows is not None:
            cache.take(rows)
        logits = coca.next_logits(search.written(position + 1)[:, -1:], cache)
        finite &= logits.isfinite().all()
    if not finite:
        raise UserError(
            "the model gives NaN or infinity for a caption's next token: its numbers overflow, "
            "more easily in fp16 and bf16 than in fp32"
        )
    return Generated(*search.result())
