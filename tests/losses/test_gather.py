"""Features gathered in pieces can be asked for as often as one likes."""

from __future__ import annotations

import pytest

from tests.ranks import on_ranks


def gather_on_rank(rank, ranks):
    import torch

    from coca_scale.engine.launch import end_world, start_world
    from coca_scale.losses import FeatureGather

    world = start_world(60)
    features = torch.arange(6.0).view(3, 2, 1) + 10 * rank
    gather = FeatureGather(features, world.gather_group, resident=4)
    passes = []
    for again in (True, False, False):
        found: list[tuple[int, list[float]]] = []
        gather.each(lambda part, x, to=found: to.append((part.start, x.flatten().tolist())), again)
        passes.append(found)
    end_world()
    return passes


@pytest.mark.slow
def test_a_third_pass_sees_what_the_first_saw():
    for first, second, third in on_ranks(gather_on_rank, 2):
        assert first == second == third
        assert first == [(i, [2.0 * i, 2 * i + 1, 10 + 2 * i, 11 + 2 * i]) for i in range(3)]
