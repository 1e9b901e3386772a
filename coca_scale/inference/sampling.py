"""One token after the other: the likeliest, or a drawn one. B images, n samples, R = B·n rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coca_scale.inference.generation_options import GenerationOptions
from coca_scale.inference.prompts import Prompts
from coca_scale.inference.scores import draw, probabilities, ruled


class Sampling:
    """Captions that grow by themselves, each from its own random numbers."""

    def __init__(
        self, prompts: Prompts, options: GenerationOptions, seeds: Sequence[int] | None
    ) -> None:
        """`seeds`: one per image, by default its index in the batch."""
        batch, length = prompts.tokens_BL.shape
        device = prompts.tokens_BL.device
        self._prompts = prompts
        self._options = options
        self.rows_per_image = options.samples
        self.tokens_BnL = prompts.tokens_BL[:, None].repeat(1, options.samples, 1)
        shape = self.tokens_BnL.shape[:2]
        self._ended_Bn = torch.zeros(shape, dtype=torch.bool, device=device)
        self._log_probs_Bn = torch.zeros(shape, device=device)
        self._lengths_Bn = torch.zeros(shape, device=device)
        seeds = range(batch) if seeds is None else seeds
        draws = [_uniform(options.seed, seed, options.samples, length) for seed in seeds]
        self._uniform_RL = torch.cat(draws).to(device)

    def advance(self, logits_RV: Tensor, position: int) -> None:
        """Choose the token of `position` in every row."""
        options, end_id = self._options, self._prompts.end_id
        tokens_RT = self.written(position)
        logits_RV = logits_RV.float()
        if options.generation_type == "greedy":
            chosen_R = ruled(logits_RV, tokens_RT, options, end_id).argmax(-1)
        else:
            chances = probabilities(logits_RV, tokens_RT, options, end_id)
            chosen_R = draw(chances, self._uniform_RL[:, position])
        log_probs_R = logits_RV.log_softmax(-1).gather(1, chosen_R[:, None])
        chosen_Bn = self._prompts.given(chosen_R.view_as(self._ended_Bn), position)
        free_B1 = (self._prompts.lengths_B <= position)[:, None]
        counts_Bn = free_B1 & ~self._ended_Bn
        self._log_probs_Bn += log_probs_R.view_as(counts_Bn) * counts_Bn
        self._lengths_Bn += counts_Bn
        chosen_Bn = torch.where(self._ended_Bn, self._prompts.pad_id, chosen_Bn)
        self.tokens_BnL[:, :, position] = chosen_Bn
        self._ended_Bn |= counts_Bn & (chosen_Bn == end_id)

    def written(self, count: int) -> Tensor:
        """The first `count` tokens of every row."""
        return self.tokens_BnL[:, :, :count].flatten(0, 1)

    @property
    def finished(self) -> bool:
        """Whether every caption has ended."""
        return bool(self._ended_Bn.all())

    def result(self) -> tuple[Tensor, Tensor]:
        """Captions [B, samples, L] and their scores [B, samples], in the order they were drawn."""
        lengths = self._lengths_Bn.clamp(min=1)
        return self.tokens_BnL, self._log_probs_Bn / lengths**self._options.length_penalty


def _uniform(seed: int, image: int, samples: int, length: int) -> Tensor:
    """Random numbers of an image, fp64 [samples, length]."""
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + image) % 2**63)
    return torch.rand(samples, length, dtype=torch.float64, generator=generator)
