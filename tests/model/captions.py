"""Token ids of captions of all kinds of lengths."""

from __future__ import annotations

import torch

from coca_scale.model.targets import Targets


def uneven_captions(config):
    """Short, full and empty captions, and ids of padding inside.

    transformers knows no empty captions, and its towers compute all as long as the longest one.
    """
    hugging_face = config.text.hf_model_name is not None
    full, least = config.context_length - 2 * hugging_face, int(hugging_face)
    tokens = torch.randint(5, config.text.vocab_size, (6, config.context_length))
    for row, count in enumerate((2, 7, full, full - 1, 9, least)):
        tokens[row, count:] = config.pad_id
    tokens[2, 4] = tokens[4, 3] = tokens[4, 5] = config.pad_id
    return tokens


def texts_of(config):
    """Captions to match, captions to write, of which one is the same, and which are parallel."""
    tokens, written = uneven_captions(config), uneven_captions(config).roll(2, 0)
    written[4] = tokens[4]
    return tokens, Targets(written, torch.tensor([0, 1, 0, 0, 0, 1]).bool())
