"""From logits to what a search chooses by. Shapes: R captions, V vocabulary, T tokens so far."""

from __future__ import annotations

import torch
from torch import Tensor

from coca_scale.inference.generation_options import GenerationOptions


def ruled(scores_RV: Tensor, tokens_RT: Tensor, options: GenerationOptions, end_id: int) -> Tensor:
    """Scores (logits or log-probabilities) after repetition penalty and minimum length."""
    if options.repetition_penalty != 1.0:
        had = scores_RV.gather(1, tokens_RT)
        penalty = options.repetition_penalty
        had = torch.where(had < 0, had * penalty, had / penalty)
        scores_RV = scores_RV.scatter(1, tokens_RT, had)
    if tokens_RT.shape[1] < options.min_seq_len:
        scores_RV = scores_RV.clone()
        scores_RV[:, end_id] = -torch.inf
    return scores_RV


def probabilities(
    logits_RV: Tensor, tokens_RT: Tensor, options: GenerationOptions, end_id: int
) -> Tensor:
    """What the next token is drawn from, fp64 [R, V]."""
    scores = ruled(logits_RV, tokens_RT, options, end_id).double() / options.temperature
    if options.generation_type == "top_k":
        least = scores.topk(min(options.top_k, scores.shape[1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    chances = scores.softmax(-1)
    if options.generation_type == "top_p":
        ordered, order = chances.sort(descending=True)
        likelier = ordered.cumsum(-1) - ordered
        left_out = (likelier >= options.top_p).scatter(1, order, likelier >= options.top_p)
        chances = chances.masked_fill(left_out, 0)
        chances = chances / chances.sum(-1, keepdim=True)
    return chances


def draw(chances_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """Tokens [R] where the cumulative probability passes `uniform_R`, fp64 in [0, 1)."""
    sums = chances_RV.cumsum(-1)
    target = (uniform_R * sums[:, -1])[:, None]
    drawn = torch.searchsorted(sums, target, right=True).squeeze(1)
    return drawn.clamp(max=chances_RV.shape[1] - 1)  # the product may round up to the whole sum
