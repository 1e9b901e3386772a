"""Greedy search."""

from __future__ import annotations

import torch
from torch import Tensor

from coca_scale.model import CoCa


@torch.no_grad()
def greedy(coca: CoCa, images: Tensor, start_id: int, end_id: int, early_stop: bool) -> Tensor:
    """The likeliest next token, again and again.

    Args:
        coca: the model, in evaluation mode.
        images: normalised images [B, 3, H, W].
        start_id: first token of every caption.
        end_id: token after which only padding follows.
        early_stop: stop as soon as every caption has ended. Leave it off under ZeRO-3 with several
            ranks, where every rank must run the model the same number of times.

    Returns:
        Token ids [B, context_length], padded.

    Raises:
        ValueError: the model has no decoder.
    """
    config = coca.config
    if coca.caption_head is None:
        raise ValueError("this model is a CLIP: it has no decoder and writes no captions")
    _, image_tokens = coca.image(images)
    shape = (images.shape[0], config.context_length)
    tokens = torch.full(shape, config.pad_id, device=images.device)
    tokens[:, 0] = start_id
    ended = torch.zeros(shape[0], dtype=torch.bool, device=images.device)
    for position in range(1, config.context_length):
        hidden = coca.hidden_states(image_tokens, tokens[:, :position])[:, -1]
        choice = coca.caption_head(hidden).argmax(-1)
        tokens[:, position] = torch.where(ended, config.pad_id, choice)
        ended |= choice == end_id
        if early_stop and bool(ended.all()):
            break
    return tokens
