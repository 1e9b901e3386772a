"""Weights made one at a time are those of the constructors."""

from __future__ import annotations

import itertools

import pytest
import torch

import coca_scale.model.deferred as deferred_module
from coca_scale.model import CoCa
from coca_scale.model.deferred import deferred
from tests.variants import CAPTIONERS, variant

OWN = [kind for kind in CAPTIONERS if not kind.startswith(("timm", "roberta"))]


def made(config):
    with deferred() as record:
        model = CoCa(config)
    return record, dict(model.state_dict(keep_vars=True))


def part(record, tensor, begin, end, name):
    target = torch.empty(end - begin, dtype=tensor.dtype)
    record.fill(target, tensor, begin, name)
    return target


@pytest.mark.parametrize("kind", OWN)
def test_all_at_once_is_what_the_constructors_make(kind, tmp_path):
    config = variant(kind, tmp_path)
    assert not config.has_foreign_towers
    torch.manual_seed(3)
    expected = CoCa(config).state_dict()
    record, tensors = made(config)
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
    assert tensors.keys() == expected.keys()
    made_here = record.make([tensors[name] for name in expected], 3)
    for (name, value), found in zip(expected.items(), made_here, strict=True):
        assert found.equal(value) and found.dtype == value.dtype, name


@pytest.mark.parametrize("kind", OWN)
def test_parts_are_of_one_whole_and_drawn_alike(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("coca_scale.model.deferred.BLOCK_ELEMENTS", 10_000)
    config = variant(kind, tmp_path)
    expected = CoCa(config).state_dict()
    record, tensors = made(config)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    for name, tensor in tensors.items():
        size, like = tensor.numel(), expected[name].reshape(-1)
        whole = part(record, tensor, 0, size, name)
        cuts = [0, size // 3, size // 2, size // 2, size]
        parts = [part(record, tensor, *cut, name) for cut in itertools.pairwise(cuts)]
        assert torch.cat(parts).equal(whole), name
        if like.std() == 0 or size == 1:
            assert whole.equal(like), name
            continue
        assert not part(record, tensor, 0, size, f"{name}2").equal(whole)
        assert whole.std() == pytest.approx(float(like.std()), rel=8 / size**0.5), name
        assert whole.abs().max() < 2 * like.abs().max(), name
        assert whole.unique().numel() > 0.9 * min(size, like.unique().numel()), name
    assert torch.random.get_rng_state().equal(before)


def test_large_weights_are_drawn_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr("coca_scale.model.deferred.BLOCK_ELEMENTS", 1000)
    record, tensors = made(variant("coca", tmp_path))
    drawn, seed_of = [], deferred_module._seed_of
    monkeypatch.setattr(
        deferred_module, "_seed_of", lambda text: drawn.append(text) or seed_of(text)
    )
    name = "text.token_embedding.weight"
    part(record, tensors[name], 2500, 3500, name)
    assert len(drawn) == 2 and tensors[name].numel() > 100_000
