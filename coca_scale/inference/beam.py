"""Beam search over a batch, as transformers 5 does it and open_clip through it.

Shapes: B images, n beams of a group, V vocabulary, L most tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coca_scale.inference.generation_options import GenerationOptions
from coca_scale.inference.prompts import Prompts
from coca_scale.inference.scores import ruled

_NEVER = -1e9


class BeamGroup:
    """The beams of all images that compete with each other."""

    def __init__(self, prompts: Prompts, beams: int, options: GenerationOptions) -> None:
        batch, device = len(prompts.lengths_B), prompts.lengths_B.device
        self._prompts = prompts
        self._options = options
        self.tokens_BnL = prompts.tokens_BL[:, None].repeat(1, beams, 1)
        self._scores_Bn = torch.full((batch, beams), _NEVER, device=device)
        self._scores_Bn[:, 0] = 0  # the others would only repeat the first one
        self.done_BnL = self.tokens_BnL.clone()
        self.done_scores_Bn = torch.full((batch, beams), _NEVER, device=device)
        self._is_done_Bn = torch.zeros(batch, beams, dtype=torch.bool, device=device)
        self._can_improve_B1 = torch.ones(batch, 1, dtype=torch.bool, device=device)

    def advance(self, log_probs_BnV: Tensor, position: int) -> Tensor:
        """Take the token of `position` for every beam.

        Returns:
            The beam [B, n] that each one now goes on from.
        """
        _, beams, vocabulary = log_probs_BnV.shape
        length = self.tokens_BnL.shape[2]
        totals = (log_probs_BnV + self._scores_Bn[..., None]).flatten(1)
        # twice as many, so that as many are left if every beam ends
        best, index = totals.topk(min(2 * beams, totals.shape[1]))
        parents, chosen = index // vocabulary, index % vocabulary
        sequences = _choose(self.tokens_BnL, parents)
        sequences[:, :, position] = chosen
        ends = (chosen == self._prompts.end_id) | (position + 1 >= length)
        self._finish(sequences, best, ends, position)
        self._scores_Bn, kept = torch.where(ends, best + _NEVER, best).topk(beams)
        self.tokens_BnL = _choose(sequences, kept)
        self._look_ahead(position)
        return parents.gather(1, kept)

    @property
    def finished(self) -> bool:
        """Whether no image can get a better caption, or should not try to."""
        if not bool(self._can_improve_B1.any()):
            return True
        return self._options.early_stopping and bool(self._is_done_Bn.all())

    def _generated(self, position: int) -> Tensor:
        """Tokens after the prompt, up to that of `position`, [B, 1]."""
        return (position + 1 - self._prompts.lengths_B).clamp(min=1)[:, None]

    def _finish(self, sequences: Tensor, best: Tensor, ends: Tensor, position: int) -> None:
        """Keep those that end now, if they are among the best ones ever."""
        beams = self.tokens_BnL.shape[1]
        scores = best / self._generated(position) ** self._options.length_penalty
        among_best = torch.arange(ends.shape[1], device=ends.device) < beams
        counts = ends & among_best & self._can_improve_B1
        if self._options.early_stopping:
            counts &= ~self._is_done_Bn.all(1, keepdim=True)
        scores = torch.where(counts, scores, _NEVER)
        all_scores = torch.cat([self.done_scores_Bn, scores], 1)
        self.done_scores_Bn, kept = all_scores.topk(beams)
        self.done_BnL = _choose(torch.cat([self.done_BnL, sequences], 1), kept)
        self._is_done_Bn = torch.cat([self._is_done_Bn, counts], 1).gather(1, kept)

    def _look_ahead(self, position: int) -> None:
        """Compare the best running beam with the worst finished one, as if it ended here."""
        possible = self._scores_Bn[:, :1] / self._generated(position) ** (
            self._options.length_penalty
        )
        worst = torch.where(self._is_done_Bn, self.done_scores_Bn.amin(1, keepdim=True), _NEVER)
        self._can_improve_B1 = self._can_improve_B1 & (possible > worst).any(1, keepdim=True)


class BeamSearch:
    """All groups of beams; rows of the model are images, each with the beams of all groups."""

    def __init__(self, prompts: Prompts, options: GenerationOptions) -> None:
        self._prompts = prompts
        self._options = options
        self.rows_per_image = options.num_beams
        beams = options.num_beams // options.num_beam_groups
        self._groups = [BeamGroup(prompts, beams, options) for _ in range(options.num_beam_groups)]

    def advance(self, logits_RV: Tensor, position: int) -> Tensor:
        """Take the token of `position` in every row; returns the row each one goes on from."""
        count, batch = self.rows_per_image, len(logits_RV) // self.rows_per_image
        log_probs = logits_RV.float().log_softmax(-1)
        log_probs = ruled(log_probs, self.written(position), self._options, self._prompts.end_id)
        log_probs_BnV = self._prompts.force(log_probs.unflatten(0, (batch, count)), position)
        taken_BV = torch.zeros_like(log_probs_BnV[:, 0])
        parents, first = [], 0
        for group in self._groups:
            beams = group.tokens_BnL.shape[1]
            mine = log_probs_BnV[:, first : first + beams]
            if self._options.diversity_penalty and first:
                mine = mine - self._options.diversity_penalty * taken_BV[:, None]
            parents.append(first + group.advance(mine, position))
            taken = group.tokens_BnL[:, :, position]
            taken_BV = taken_BV.scatter_add(1, taken, torch.ones_like(taken, dtype=torch.float))
            first += beams
        image_first = torch.arange(0, batch * count, count, device=logits_RV.device)
        return (image_first[:, None] + torch.cat(parents, 1)).flatten()

    def written(self, count: int) -> Tensor:
        """The first `count` tokens of every row."""
        groups = [group.tokens_BnL[:, :, :count] for group in self._groups]
        return torch.cat(groups, 1).flatten(0, 1)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return all(group.finished for group in self._groups)

    def result(self) -> tuple[Tensor, Tensor]:
        """The best captions [B, samples, L] and their scores [B, samples], best first."""
        scores = torch.cat([group.done_scores_Bn for group in self._groups], 1)
        tokens = torch.cat([group.done_BnL for group in self._groups], 1)
        best, kept = scores.topk(self._options.samples)
        return _choose(tokens, kept), best


def _choose(sequences_BML: Tensor, kept_BN: Tensor) -> Tensor:
    """Some of each image's sequences, [B, N, L]."""
    index = kept_BN[..., None].expand(-1, -1, sequences_BML.shape[2])
    return sequences_BML.gather(1, index)
