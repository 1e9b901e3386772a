"""How captions begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coca_scale.errors import UserError


@dataclass(frozen=True)
class Prompts:
    """Tokens that captions are given, which may be of several lengths.

    Attributes:
        tokens_BL: int64, padded to the most tokens of a caption.
        lengths_B: int64, how many are given; at least 1.
        end_id: ends a caption.
        pad_id: stands behind the end.
    """

    tokens_BL: Tensor
    lengths_B: Tensor
    end_id: int
    pad_id: int

    @property
    def shortest(self) -> int:
        """Tokens that every caption is given."""
        return int(self.lengths_B.min())

    def force(self, log_probs_BnV: Tensor, position: int) -> Tensor:
        """Make the given token of `position` certain where there is one."""
        given_B = self.lengths_B > position
        if not bool(given_B.any()):
            return log_probs_BnV
        certain_BV = torch.full_like(log_probs_BnV[:, 0], -torch.inf)
        certain_BV.scatter_(1, self.tokens_BL[:, position : position + 1], 0)
        return torch.where(given_B[:, None, None], certain_BV[:, None], log_probs_BnV)

    def given(self, chosen_Bn: Tensor, position: int) -> Tensor:
        """The given token of `position` where there is one, the chosen one elsewhere."""
        given_B1 = (self.lengths_B > position)[:, None]
        return torch.where(given_B1, self.tokens_BL[:, position : position + 1], chosen_Bn)


def make_prompts(
    prompts: Sequence[Sequence[int]], length: int, end_id: int, pad_id: int, device: torch.device
) -> Prompts:
    """Lay out prompts of at least one token each.

    Raises:
        UserError: one leaves no place for a caption of `length` tokens.
    """
    longest = max(len(prompt) for prompt in prompts)
    if longest >= length:
        raise UserError(
            f"a prompt of {longest} tokens leaves no place in captions of {length} tokens (seq_len)"
        )
    rows = [[*prompt, *[pad_id] * (length - len(prompt))] for prompt in prompts]
    lengths = [len(prompt) for prompt in prompts]
    tokens_BL, lengths_B = (torch.tensor(x, device=device) for x in (rows, lengths))
    return Prompts(tokens_BL, lengths_B, end_id, pad_id)
