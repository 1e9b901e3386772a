"""How captions are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from coca_scale.errors import UserError

GenerationType = Literal["beam_search", "greedy", "top_k", "top_p"]
DEFAULT_LENGTH = 30


@dataclass(frozen=True)
class GenerationOptions:
    """Names and defaults are those of `generate` in open_clip where it has them.

    Attributes:
        generation_type: beam search; the likeliest token each time; or one drawn from the `top_k`
            likeliest, or from the smallest set that has `top_p` of the probability (Holtzman et al.
            2020).
        seq_len: most tokens of a caption, start and end token included; by default 30, or the
            model's context length where that is less.
        min_seq_len: no caption ends before this many tokens, start token included.
        num_beams: of beam search.
        num_beam_groups: beams fall into as many groups, which avoid each other's tokens
            (Vijayakumar et al. 2018).
        diversity_penalty: what a token loses for every beam of an earlier group that takes it.
        length_penalty: a beam's log-probability is divided by its length to this power; above 0
            favours long captions.
        early_stopping: end an image's search with as many finished captions as beams, and not when
            no better one can be expected.
        temperature: divides the logits that tokens are drawn from.
        top_k: see `generation_type`.
        top_p: see `generation_type`.
        repetition_penalty: logits of tokens that a caption has are divided by it, or multiplied
            where negative (Keskar et al. 2019); 1 does nothing.
        samples: captions per image; of beam search, the best ones.
        seed: of drawing. The same seed draws the same for an image, in whatever batch.
    """

    generation_type: GenerationType = "beam_search"
    seq_len: int | None = None
    min_seq_len: int = 5
    num_beams: int = 6
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool = False
    temperature: float = 1.0
    top_k: int = 1
    top_p: float = 0.1
    repetition_penalty: float = 1.0
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UserError: naming the option and its range.
        """
        if self.generation_type not in get_args(GenerationType):
            raise UserError(
                f"generation_type is one of {', '.join(get_args(GenerationType))}, "
                f"not {self.generation_type!r}"
            )
        for name in ("num_beams", "num_beam_groups", "top_k", "samples"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is at least 1, not {getattr(self, name)}")
        for name in ("temperature", "repetition_penalty"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is more than 0, not {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is between 0 and 1, not {self.top_p}")
        if self.seq_len is not None and self.seq_len < 2:
            raise UserError(f"seq_len is at least 2, not {self.seq_len}")
        if self.seq_len is not None and self.min_seq_len >= self.seq_len:
            raise UserError(
                f"min_seq_len ({self.min_seq_len}) must be less than seq_len ({self.seq_len})"
            )
        self._check_beams()

    def _check_beams(self) -> None:
        if self.num_beams % self.num_beam_groups:
            raise UserError(
                f"num_beams ({self.num_beams}) must be a multiple of num_beam_groups "
                f"({self.num_beam_groups})"
            )
        if self.generation_type == "beam_search" and self.samples > self.num_beams:
            raise UserError(
                f"samples ({self.samples}) cannot be more than num_beams ({self.num_beams})"
            )
        if self.generation_type == "greedy" and self.samples > 1:
            raise UserError("greedy search has one caption per image; draw several with top_p")

    def length(self, context_length: int) -> int:
        """Most tokens of a caption of a model with this context length."""
        return min(DEFAULT_LENGTH, context_length) if self.seq_len is None else self.seq_len
