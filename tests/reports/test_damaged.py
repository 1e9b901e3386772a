"""Reports and model cards of runs whose files a disk has damaged or a person has edited."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from coca_scale.errors import UserError
from coca_scale.evaluation.kinds import flat_scores
from coca_scale.recipe import dump_recipe
from coca_scale.reports.page import read_run, report
from coca_scale.reports.publish import prepare
from tests.conftest import tiny_recipe
from tests.variants import untrained_export

NAMES = (
    *("step", "loss", "samples_seen", "global_batch", "samples_per_second", "peak_memory_bytes"),
    *("bad_samples", "skipped_steps", "samples", "host", *(name for name, _, _ in flat_scores())),
)
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, 1e299, 1e308, 10**400]))
VALUES = st.one_of(NUMBERS, NUMBERS, st.none(), st.booleans(), st.text(max_size=3), st.just([1]))
LINES = st.builds(
    lambda step, line: {"step": step, **line},
    st.integers(0, 30),
    st.dictionaries(st.sampled_from(NAMES), VALUES),
)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return untrained_export(tmp_path_factory.mktemp("export"))


def write_run(folder, metrics=(), validation=()):
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(dump_recipe(tiny_recipe()))
    for name, lines in (("metrics", metrics), ("validation", validation)):
        content = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(content)
    return folder


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("global_batch", "x"), ("peak_memory_bytes", "x"), ("loss", "x"), ("loss", [1])),
        *(("samples_per_second", "x"), ("samples_seen", True), ("lr", {}), ("step", 1.5)),
    ],
)
def test_a_line_with_something_else_than_a_number_is_left_out_and_counted(tmp_path, name, value):
    good = {"step": 1, "loss": 2.5, "global_batch": 16, "note": "kept"}
    run = write_run(tmp_path / "run", [good, {**good, "step": 2, name: value}])
    read = read_run(run)
    assert [line["step"] for line in read.metrics] == [1] and read.damaged == 1
    assert "1, left out" in report([run])


@pytest.mark.parametrize("line", [{"samples": "x"}, {"image_to_text_r1": "x"}, {"step": -1}])
def test_so_is_a_line_of_a_validation(tmp_path, line):
    good = {"step": 1, "samples": 8, "image_to_text_r1": 0.5}
    run = write_run(tmp_path / "run", [{"step": 1}], [good, {**good, "step": 2, **line}])
    read = read_run(run)
    assert read.validation == [good] and read.damaged == 1
    assert "1, left out" in report([run])


def test_other_pictures_among_the_sheets_are_no_sheets(tmp_path):
    run = write_run(tmp_path / "run", [{"step": 1}])
    (run / "validation").mkdir()
    (run / "validation" / "step_mine.png").touch()
    assert "data:image/png" not in report([run])


@settings(max_examples=100, deadline=None)
@given(metrics=st.lists(LINES), validation=st.lists(LINES))
def test_any_lines_give_a_page_and_a_card_of_finite_numbers(
    export, tmp_path_factory, metrics, validation
):
    run = write_run(tmp_path_factory.getbasetemp() / "any", [{"step": 1}, *metrics], validation)
    assert "<html" in report([run])
    card = ModelCard(prepare(export, "org/name", run).card)
    for result in card.data.eval_results or ():
        assert abs(result.metric_value) < float("inf")


def test_a_card_leaves_out_what_a_run_does_not_say(export, tmp_path):
    run = write_run(tmp_path / "run", [{"step": 1200}], [{"step": 1200, "cider": 0.5}])
    card = prepare(export, "org/name", run).card
    assert "| samples seen | 1,200 steps |" in card
    assert "the run's own validation data, step 1,200" in card


def test_a_card_is_of_recipes_as_people_may_write_them(export, tmp_path):
    run = write_run(tmp_path / "run", [{"step": 2, "samples_seen": 16, "global_batch": 8}])
    recipe = run / "recipe.yaml"
    recipe.write_text(
        "run: {name: mine}\nmodel: {name: coca_tiny}\ndata: {train: shards/train.tar}\n"
        "optim: {lr: 0.25}\ntrain: {steps: 2, global_batch: 8, micro_batch: 8}\n"
    )
    card = prepare(export, "org/name", run).card
    assert "| data | train.tar |" in card and "lr 0.25, weight decay 0.1, cosine" in card
    recipe.write_text(recipe.read_text().replace("0.25", "x"))
    with pytest.raises(UserError, match=r"recipe\.yaml: optim\.lr: .*found 'x'") as caught:
        prepare(export, "org/name", run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e308", '"x"'])
def test_scores_that_are_no_finite_numbers_are_refused(export, tmp_path, value):
    scores = tmp_path / "scores.json"
    content = {"task": "retrieval", "data": ["coco"], "scores": {"r1": "HERE"}}
    scores.write_text(json.dumps(content).replace('"HERE"', value))
    with pytest.raises(UserError, match=r"scores\.json: scores\.r1: .*: not scores") as caught:
        prepare(export, "org/name", scores=[scores])
    assert "\n" not in str(caught.value)


def test_a_card_tells_of_the_stages_of_a_run(export, tmp_path):
    lines = [{"step": 9, "samples_seen": 112, "global_batch": 8, "stage": 2}]
    run = write_run(tmp_path / "run", lines)
    (run / "recipe.yaml").write_text(
        "run: {name: mine}\nmodel: {name: coca_tiny}\ndata: {train: shards/train.tar}\n"
        "optim: {lr: 0.25}\ntrain: {global_batch: 8, micro_batch: 8}\nschedule: {stages: ["
        "{steps: 5, image_size: 24, global_batch: 16, train: /home/me/first/train.csv}, "
        "{samples: 32, caption_weight: 0.5}]}\n"
    )
    card = prepare(export, "org/name", run).card
    assert "| samples seen | 112 in 9 steps |" in card
    assert "| stages | 5 steps of 16 at 24 px; then 32 samples of 8 at full size |" in card
    assert "| data | train.csv, train.tar |" in card
    assert "0.5 × caption" in card and "/home/me" not in card
