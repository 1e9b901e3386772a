"""The sample order: the same on any number of ranks and workers, exact over epochs and resumes."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from coca_scale.data.loader import deal_lanes
from coca_scale.data.sample import DataError
from tests.data.loading import steps
from tests.data.shards import encoded, write_shards


@pytest.fixture(scope="module", params=["shards", "few_shards", "table", "synthetic"])
def train(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    if request.param == "shards":
        return write_shards(folder, [6] * 24)
    if request.param == "few_shards":
        return write_shards(folder, [48, 48, 48])
    if request.param == "synthetic":
        return "synthetic://shapes?count=144&size=32"
    for i in range(144):
        (folder / f"{i}.jpg").write_bytes(encoded())
    rows = "".join(f"{i}.jpg\tword {i}\n" for i in range(144))
    (folder / "t.tsv").write_text("filepath\ttitle\n" + rows)
    return str(folder / "t.tsv")


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (4, 0), (1, 2), (2, 3)])
def test_order_does_not_depend_on_the_cluster(train, ranks, workers):
    expected_keys, expected_states, expected_pixels = steps(train, 5)
    keys, states, pixels = steps(train, 5, ranks, workers)
    assert keys == expected_keys
    assert states == expected_states
    assert torch.equal(pixels, expected_pixels)


def test_every_epoch_has_every_sample_once(train):
    keys, _, _ = steps(train, 36)  # 3 epochs of 144 samples
    flat = list(itertools.chain.from_iterable(keys))
    for epoch in range(3):
        counts = Counter(flat[epoch * 144 : (epoch + 1) * 144])
        assert len(counts) == 144
        assert set(counts.values()) == {1}
    assert flat[:144] != flat[144:288]


def test_resume_goes_on_at_the_very_sample_with_other_ranks(train):
    whole, _, pixels = steps(train, 9)
    first, states, _ = steps(train, 4, ranks=2, workers=2)
    rest, _, rest_pixels = steps(train, 5, ranks=4, saved=states)
    assert first + rest == whole
    assert torch.equal(rest_pixels, pixels[4:])


def test_lanes_of_a_checkpoint_must_match():
    with pytest.raises(DataError, match=r"data\.lanes=3"):
        deal_lanes(4, 0, 1, [[0, 0, 0, 0, 0]] * 3)


def test_fewer_samples_than_lanes_is_an_error():
    with pytest.raises(DataError, match="4 samples for 12 lanes"):
        steps("synthetic://shapes?count=4&size=32", 1)
