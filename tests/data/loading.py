"""Training batches of the ranks of a job, loaded in this process."""

from __future__ import annotations

from functools import cache

import torch

from coca_scale.data.loader import Draws, TrainDataset, TrainLoader, deal_lanes
from coca_scale.data.sources import open_source, train_crop
from coca_scale.data.tokens import make_tokenizer
from coca_scale.model import load_model_config
from tests.conftest import tiny_recipe

BATCH = 12


class Echo:
    """A tokenizer that gives the caption back."""

    def __call__(self, captions):
        return captions


@cache
def _tokenizer():
    return make_tokenizer(load_model_config("coca_tiny"))


def loader(
    train, rank, ranks, workers=0, saved=None, lanes=12, batch=BATCH, size=48, window=4, **data
):
    """What one rank reads of `train`, on from the saved lane states."""
    recipe = tiny_recipe(data__train=train, data__shuffle_window=window, **data)
    dataset = TrainDataset(
        source=open_source(recipe.data.train, recipe.data, 0),
        tokenizer=_tokenizer(),
        crop=train_crop(recipe.data, size),
        seed=0,
        lanes=lanes,
        samples_per_lane=batch // lanes,
        states=deal_lanes(lanes, rank, ranks, saved),
        draws=Draws.of(recipe),
    )
    return TrainLoader(dataset, workers)


def steps(train, count, ranks=1, workers=0, saved=None, lanes=12, **data):
    """Keys per step over all ranks, the lane states after the last one, and the pixels."""
    streams = [iter(loader(train, r, ranks, workers, saved, lanes, **data)) for r in range(ranks)]
    keys, pixels, states = [], [], {}
    for _ in range(count):
        batches = [next(stream) for stream in streams]
        keys.append([key for batch in batches for key in batch.keys])
        pixels.append(torch.cat([batch.images for batch in batches]))
        for batch in batches:
            states.update(batch.lanes)
    return keys, [list(states[lane]) for lane in sorted(states)], torch.stack(pixels)
