"""What was left out ends a run when it is too much, however short the run is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coca_scale.data.sample import Skipped
from coca_scale.engine.ownership import Owner
from coca_scale.engine.world import World
from coca_scale.errors import AgreedError
from coca_scale.training.skipped import SkipLog, too_many
from tests.json_lines import lines_of


def steps_until_it_ends(folder, share_of_bad, limit, steps, batch=8):
    """Steps of a run with so many bad samples beside every good one; None if it goes on."""
    log = SkipLog(World.alone(torch.device("cpu")), Owner(None, True), folder, limit)
    due = 0.0
    for step in range(1, steps + 1):
        due += batch * share_of_bad / (1 - share_of_bad)
        new = [Skipped("broken_image", f"{step}_{n}") for n in range(int(due) - log.bad)]
        try:
            log.total(*log.add(new), good=step * batch, step=step)
        except AgreedError as error:
            assert f"{log.bad} of {log.bad + step * batch} samples are unusable" in str(error)
            assert len(lines_of(folder / "bad_samples.jsonl")) == log.bad
            return step
    return None


@pytest.mark.parametrize(
    ("share", "limit", "last"),
    [(0.5, 0.1, 1), (0.3, 0.1, 5), (0.9, 0.5, 1), (0.2, 0.0, 1), (0.12, 0.1, 32)],
)
def test_a_short_run_over_bad_data_ends(share, limit, last, tmp_path):
    assert steps_until_it_ends(tmp_path, share, limit, last) is not None


@pytest.mark.parametrize(("share", "limit"), [(0.09, 0.1), (0.45, 0.5), (0.0, 0.0), (0.9, 1.0)])
def test_a_run_whose_data_keeps_to_the_limit_goes_on(share, limit, tmp_path):
    assert steps_until_it_ends(tmp_path, share, limit, 100) is None


def test_bad_luck_at_the_start_ends_no_run():
    """Of 1,000 runs over data with half of what is allowed, none ends in its first samples."""
    rng = np.random.default_rng(0)
    for _ in range(1000):
        bad = (rng.random(255) < 0.05).cumsum()
        assert not any(too_many(int(bad[n - 1]), n, 0.1) for n in range(1, 256, 8))


@given(st.integers(0, 300), st.integers(0, 300), st.floats(0, 1))
def test_never_up_to_the_limit_and_always_above_it_where_samples_are_many(bad, good, limit):
    seen = bad + good
    if bad <= limit * seen:
        assert not too_many(bad, seen, limit)
    elif seen >= 256 or limit == 0:
        assert too_many(bad, seen, limit)
