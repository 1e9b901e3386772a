"""Which caption a sample gets, and which samples the recipe leaves out."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from webdataset import TarWriter

from coca_scale.data.images import TrainCrop
from coca_scale.data.loader import decode_sample
from coca_scale.data.rules import SampleRules
from coca_scale.data.sample import BadSample
from coca_scale.recipe import RecipeError
from coca_scale.recipe.data import DataFilters
from tests.conftest import tiny_recipe
from tests.data.loading import Echo, loader
from tests.data.shards import encoded

FIELDS = {
    "safe": True,
    "count": 1,
    "caption": "alt text",
    "recaption": "a synthetic caption",
    "captions": ["one", "two", "  ", "three"],
    "similarity": 0.31,
    "LANGUAGE": "en",
    "NSFW": None,
}
FILES = {"jpg": encoded(), "txt": b"from txt", "json": json.dumps(FIELDS).encode()}


def captions_of(weights, files=FILES, draws=4000):
    sample = SampleRules(weights, DataFilters()).sample("k", files, "s.tar")
    rng = np.random.default_rng(0)
    crop = TrainCrop(8, 1.0)
    drawn = Counter(decode_sample(sample, Echo(), crop, rng).tokens for _ in range(draws))
    return sample, {text: count / draws for text, count in drawn.items()}


def test_the_txt_counts_and_the_json_where_there_is_none():
    assert captions_of({}, draws=3)[1] == {"from txt": 1.0}
    without = {"jpg": FILES["jpg"], "json": FILES["json"]}
    assert captions_of({}, without, draws=3)[1] == {"alt text": 1.0}


def test_captions_are_drawn_by_their_weights():
    sample, share = captions_of({"txt": 1.0, "recaption": 3.0})
    assert sample.caption == "a synthetic caption"  # the heaviest is the main one
    assert share == pytest.approx({"from txt": 0.25, "a synthetic caption": 0.75}, abs=0.03)
    _, share = captions_of({"captions": 1.0, "txt": 1.0})
    # a list shares its weight; what has no words is left out and the rest goes on as it is
    expected = {"from txt": 0.5, "one": 0.125, "two": 0.125, "three": 0.125}
    whole = sum(expected.values())
    assert share == pytest.approx({k: v / whole for k, v in expected.items()}, abs=0.03)
    _, share = captions_of({"nothing": 5.0, "txt": 1.0}, draws=10)
    assert share == {"from txt": 1.0}


@pytest.mark.parametrize(
    ("weights", "files", "cause"),
    [
        ({"recaption": 1.0}, {"jpg": b"x", "txt": b"words"}, "missing_caption"),
        ({"NSFW": 1.0}, FILES, "missing_caption"),
        ({"a": 1.0}, {"jpg": b"x", "json": b'{"a": " "}'}, "empty_caption"),
        ({"a": 1.0}, {"jpg": b"x", "json": b"[" * 100_000}, "broken_json"),
        ({"a": 1.0}, {"jpg": b"x", "json": b"[1]"}, "broken_json"),
        ({}, {"jpg": b"", "txt": b"words"}, "broken_image"),
    ],
)
def test_what_is_missing_has_a_name(weights, files, cause):
    with pytest.raises(BadSample, match=cause):
        SampleRules(weights, DataFilters()).sample("k", files, "s.tar")


@pytest.mark.parametrize(
    ("rule", "passes"),
    [
        ({"similarity": {"min": 0.3}}, True),
        ({"similarity": {"min": 0.3, "max": 0.305}}, False),
        ({"LANGUAGE": {"one_of": ["en", "de"]}}, True),
        ({"LANGUAGE": {"one_of": ["de"]}}, False),
        ({"safe": {"one_of": [True]}}, True),
        ({"safe": {"one_of": [1, False]}}, False),
        ({"count": {"one_of": [1]}}, True),
        ({"count": {"one_of": [True]}}, False),
        ({"LANGUAGE": {"min": 0}}, False),
        ({"absent": {"max": 1.0}}, False),
        ({"NSFW": {}}, False),
        ({"caption": {}}, True),
    ],
)
def test_conditions_on_fields(rule, passes):
    rules = SampleRules({}, DataFilters.model_validate({"fields": rule}))
    if passes:
        assert rules.sample("k", FILES, "s.tar").caption == "from txt"
    else:
        with pytest.raises(BadSample, match=f"filtered_{next(iter(rule))}") as caught:
            rules.sample("k", FILES, "s.tar")
        assert caught.value.skipped.filtered


def test_filters_of_a_recipe_are_counted_apart(tmp_path):
    sizes = [(24, 24), (16, 60), (60, 200), (40, 20)]
    with TarWriter(str(tmp_path / "0.tar")) as writer:
        for number, size in enumerate(sizes * 6):
            similarity = {"similarity": number / 24}
            writer.write(
                {
                    "__key__": f"{number:02d}",
                    "jpg": encoded(size=size),
                    "txt": "words",
                    "json": json.dumps(similarity).encode(),
                }
            )
    filters = {"min_side": 20, "max_aspect_ratio": 3.0, "fields": {"similarity": {"min": 0.5}}}
    batch = next(iter(loader(str(tmp_path), 0, 1, lanes=2, data__filters=filters)))
    assert {int(key) for key in batch.keys} <= {12, 15, 16, 19, 20, 23}
    found = Counter((s.cause, s.filtered) for s in batch.skipped)
    assert set(found) == {
        ("filtered_similarity", True),
        ("filtered_min_side", True),
        ("filtered_aspect_ratio", True),
    }


def test_mistakes_in_the_recipe_are_named():
    for change, message in (
        ({"data__captions": {"txt": -1}}, r"data\.captions.*greater than 0"),
        ({"data__filters": {"min_sides": 3}}, r"filters.*min_sides: unknown key"),
        ({"data__train": [{"shards": "a.tar", "weight": 0}]}, "greater than 0"),
    ):
        with pytest.raises(RecipeError, match=message):
            tiny_recipe(**change)
