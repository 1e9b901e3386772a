"""What a teacher costs in a plan, and what `check` says of one."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from coca_scale.inference.load import load_model
from coca_scale.planning.check import check
from coca_scale.planning.costs import caption_quantiles
from coca_scale.planning.fit import plan_run, teacher_is_cut
from coca_scale.planning.gpus import GPUS
from coca_scale.planning.plan_text import plan_page
from coca_scale.recipe import BatchSplit
from tests.conftest import tiny_recipe
from tests.data.shards import write_shards
from tests.invoke import output_of
from tests.variants import untrained_export

GPU = GPUS["a100-40gb"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return str(untrained_export(tmp_path_factory.mktemp("teacher") / "export"))


def taught(teacher, **changes):
    return tiny_recipe(loss__distill={"teacher": teacher, **changes})


def towers(teacher):
    coca = load_model(teacher).model.coca
    coca.decoder = coca.caption_head = None
    return coca


def test_it_is_counted_as_what_it_computes(teacher):
    _, costs, plan = plan_run(taught(teacher), 2, GPU)
    _, _, alone = plan_run(tiny_recipe(), 2, GPU)
    coca = towers(teacher)
    weights = sum(p.nbytes for p in coca.parameters())
    captions = coca.text.pack(caption_quantiles(8, 20.0, 16, 0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        coca.encode(torch.zeros(8, 3, 48, 48), captions)
    assert costs.teacher.weights_bytes == plan.teacher_bytes == weights
    assert costs.teacher.forward_flops == counter.get_total_flops()
    more = plan.flops_per_sample - alone.flops_per_sample
    assert more == pytest.approx(counter.get_total_flops() / 8)
    assert plan.total_bytes - alone.total_bytes == pytest.approx(weights, rel=0.05)
    assert plan.communication_bytes_per_step > alone.communication_bytes_per_step
    about = (BatchSplit.from_recipe(tiny_recipe(), 2), costs, plan, GPU, "a100-40gb")
    assert "the teacher's weights" in plan_page(taught(teacher), *about)
    assert (alone.teacher_bytes, plan.json()["teacher_bytes"]) == (0, weights)


def test_it_is_cut_where_there_is_no_room_for_all_of_it(teacher):
    small = replace(GPU, memory_bytes=2e10)
    _, _, whole = plan_run(taught(teacher), 2, small)
    _, _, cut = plan_run(taught(teacher, placement="sharded"), 2, small)
    assert cut.teacher_bytes == whole.teacher_bytes // 2
    assert cut.communication_bytes_per_step > whole.communication_bytes_per_step
    between = (whole.total_bytes + cut.total_bytes) / 2 / 0.97
    full = replace(GPU, memory_bytes=between)
    split = BatchSplit.from_recipe(tiny_recipe(), 2)
    for placement, gpu, expected in (
        ("auto", GPU, False),
        ("auto", full, True),
        ("replicated", full, False),
        ("sharded", GPU, True),
    ):
        assert teacher_is_cut(taught(teacher, placement=placement), split, gpu, 2) == expected


def test_stored_features_cost_nothing_but_their_gather(teacher, tmp_path):
    write_shards(tmp_path, [9])
    output_of("data", "embed", teacher, tmp_path, "--out", tmp_path / "features")
    recipe = tiny_recipe(
        data__train=str(tmp_path), loss__distill={"teacher": str(tmp_path / "features")}
    )
    _, costs, plan = plan_run(recipe, 2, GPU)
    _, _, alone = plan_run(tiny_recipe(data__train=str(tmp_path)), 2, GPU)
    assert costs.teacher is None and plan.teacher_bytes == 0
    assert plan.flops_per_sample == alone.flops_per_sample
    assert costs.features_bytes == 8 * 2 * 2 * 128 * 4
    assert "teacher: features of" in check(recipe, 2, 10**12).text()
    write_shards(tmp_path, [9, 9])
    (fault,) = [f for f in check(recipe, 2, 10**12).faults if f.startswith("teacher")]
    assert "no features of 1 of 2 shards" in fault


def test_check_says_what_is_wrong_with_it(teacher, tmp_path):
    clip = {"teacher": "ViT-B-32@openai", "feature_weight": 1.0}
    for distill, fault in (
        ({"teacher": str(tmp_path / "gone")}, "teacher: .*gone: no such folder or file"),
        (clip, "teacher: loss.distill.feature_weight: the teacher's features have 512 elements"),
    ):
        (found,) = check(tiny_recipe(loss__distill=distill), 2, 10**12).faults
        assert re.match(fault, found), found
    report = check(taught(teacher), 2, 10**12)
    assert not report.faults and "runs beside the model" in report.text()
