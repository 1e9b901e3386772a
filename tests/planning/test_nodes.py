"""Over how many nodes a recipe divides."""

from __future__ import annotations

import pytest

from coca_scale.errors import UserError
from coca_scale.planning.nodes import main, node_counts
from tests.conftest import tiny_recipe

WIDE = {"train__global_batch": 48, "data__lanes": 48}
STAGES = {
    **WIDE,
    "train__steps": None,
    "schedule__stages": [{"steps": 2}, {"steps": 2, "micro_batch": 3}],
}


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({}, [8, 4, 2, 1]),
        ({"train__micro_batch": 8}, None),
        (WIDE, [8, 6, 4, 3, 2, 1]),
        (STAGES, [8, 4, 2, 1]),
        ({**STAGES, "train__micro_batch": 2}, None),
    ],
)
def test_node_counts(changes, counts):
    recipe = tiny_recipe(**{"train__micro_batch": 1, **changes})
    if counts is None:
        with pytest.raises(UserError, match=r"does not divide the \d samples per rank"):
            node_counts(recipe, 8, 2)
    else:
        assert node_counts(recipe, 8, 2) == counts


def test_what_the_job_script_reads(capfd, tmp_path):
    assert main("recipes/tiny.yaml", "2", "1", f"run.dir={tmp_path}", "--odd") == 0
    assert capfd.readouterr().out == f"{tmp_path}\n2 1\n"
    assert main("recipes/tiny.yaml", "2", "1", "train.step=3") == 2
    assert "did you mean train.steps?" in capfd.readouterr().err
