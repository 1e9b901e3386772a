"""Micro-batches of equal token counts, made of the very samples of a rank's share."""

from __future__ import annotations

from functools import partial
from itertools import islice

import torch

from coca_scale.data.lengths import balanced_order
from coca_scale.data.loader import TrainLoader
from tests.data.loading import loader


def test_totals_differ_by_at_most_the_longest_caption():
    torch.manual_seed(0)
    for micro_batch, count in ((1, 7), (7, 1), (16, 4), (192, 8)):
        lengths = torch.poisson(torch.full((micro_batch * count,), 18.0)).long() + 2
        lengths[0] = 77
        order = balanced_order(lengths, micro_batch)
        assert sorted(order.tolist()) == list(range(len(lengths)))
        totals = lengths[order].view(count, micro_batch).sum(1)
        assert totals.max() - totals.min() <= 77
        if micro_batch == 192:
            before = lengths.view(count, micro_batch).sum(1)
            assert totals.max() - totals.min() < (before.max() - before.min()) / 3


def test_an_arranged_batch_is_the_batch_in_another_order():
    train = "synthetic://shapes?count=144&size=32"
    plain = loader(train, 0, 1, workers=2)
    arranged = TrainLoader(plain._loader.dataset, 2, partial(balanced_order, micro_batch=4))
    for expected, found in islice(zip(plain, arranged, strict=False), 3):
        order = found.share_indices
        assert order.tolist() != list(range(len(order)))
        assert torch.equal(found.images, expected.images[order])
        assert torch.equal(found.tokens, expected.tokens[order])
        assert found.keys == [expected.keys[i] for i in order]
        assert found.lanes == expected.lanes
