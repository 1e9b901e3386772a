"""Recipes as text: what words and numbers mean, what is written reads back, what is no recipe."""

from __future__ import annotations

import math
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from coca_scale.recipe import Recipe, RecipeError, dump_recipe, load_recipe, recipe_from_dict
from coca_scale.recipe.section import PathText, Section, with_home
from coca_scale.recipe.yaml_text import dump_yaml, parse_yaml
from tests.conftest import tiny_recipe

TINY = "recipes/tiny.yaml"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, word) for word in ("no", "No", "off", "y", "n", "on", "yes", "NO", "tRue")),
        *((word, word) for word in ("1:30", "190:20:30", "2024-01-01", "1_000", "0b11", "=")),
        *((word, word) for word in ("2001-12-14 21:59:43", "0o8", "+0x1", "1e", ".", "-x", "e1")),
        *(
            ("true", True),
            ("False", False),
            ("TRUE", True),
            ("null", None),
            ("~", None),
            ("", None),
        ),
        *(("010", 10), ("08", 8), ("0o17", 15), ("0x1F", 31), ("-7", -7), ("+7", 7), ("0", 0)),
        *(
            ("1e-3", 1e-3),
            ("1E3", 1e3),
            (".5", 0.5),
            ("1.", 1.0),
            ("+.5e1", 5.0),
            ("-.inf", -math.inf),
        ),
    ],
)
def test_scalars_are_those_of_the_core_rules(text, value):
    found = parse_yaml(text)
    assert found == value and type(found) is type(value)
    assert parse_yaml(f'"{text}"') == text


def test_words_stay_words_in_files_and_overrides(tmp_path):
    fields = "{lang: {one_of: [no, en, off, y, 1:30]}, no: {min: 1e-3}}"
    file = tmp_path / "r.yaml"
    data = "data:\n  train: synthetic://shapes\n  filters: {fields: " + fields + "}\n"
    file.write_text(data + "model: {name: x}\nrun: {name: on}\noptim: {lr: 1e-3}\n"
                    "train: {steps: 1, global_batch: 1, micro_batch: 1}\n")  # fmt: skip
    for recipe in (
        load_recipe(file),
        load_recipe(TINY, [f"data.filters.fields={fields}", "run.name=on"]),
    ):
        assert recipe.data.filters.fields["lang"].one_of == ["no", "en", "off", "y", "1:30"]
        assert recipe.data.filters.fields["no"].min == 1e-3
        assert recipe.run.name == "on"
        assert recipe_from_dict(parse_yaml(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize("word", ["off", "no", "False", "NO", "false", "Off"])
def test_switches_take_the_words_they_took(word):
    assert load_recipe(TINY, [f"log.tensorboard={word}"]).log.tensorboard is False
    assert load_recipe(TINY, ["model.lock_image=yes"]).model.lock_image is True
    raw = load_recipe(TINY, [f"engine.deepspeed={{comms_logger: {{enabled: {word}}}, a: [on]}}"])
    assert raw.engine.deepspeed == {"comms_logger": {"enabled": False}, "a": [True]}
    with pytest.raises(RecipeError, match=r"log: wandb is the name of a project|valid string"):
        load_recipe(TINY, [f"log.wandb={word}"])


def test_grouped_digits_are_numbers_where_a_number_is_meant():
    recipe = load_recipe(
        TINY,
        [
            *("train.samples=13_000_000", "log.profile_steps=[1_0, 1_1]", "optim.lr=1_0.5e-4"),
            *("run.name=1_000", "engine.deepspeed={a: {reduce_bucket_size: 5_000}}"),
        ],
    )
    assert recipe.train.samples == 13_000_000
    assert recipe.log.profile_steps == [10, 11]
    assert recipe.optim.lr == 10.5e-4
    assert recipe.run.name == "1_000"
    assert recipe.engine.deepspeed["a"]["reduce_bucket_size"] == 5000
    for wrong in ("1:30", "_1", "1__x", "on"):
        with pytest.raises(RecipeError, match="valid integer"):
            load_recipe(TINY, [f"train.steps={wrong}"])


TEXT = st.text(st.characters(exclude_categories=[]), max_size=12) | st.sampled_from(
    ["no", "010", "0o17", "1e3", "1:30", "~", "", "=", "<<", "2024-01-01", "08", "+.5", "- a", "#"]
)
DATA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(DATA)
def test_what_is_written_reads_back_by_either_version(content):
    text = dump_yaml(content)
    assert parse_yaml(text) == content
    assert yaml.safe_load(text) == content, "tools of others read recipes by version 1.1"


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_written_before_mean_the_same(path):
    recipe = load_recipe(path, ["data.filters.fields={a: {one_of: ['no', '010', '1:30', true]}}"])
    assert recipe_from_dict(parse_yaml(yaml.safe_dump(recipe.model_dump()))) == recipe


@settings(max_examples=100, deadline=None)
@given(name=TEXT.filter(bool), words=st.lists(TEXT | st.booleans(), min_size=1, max_size=4))
def test_any_recipe_round_trips(name, words):
    recipe = tiny_recipe(
        run__name=name,
        data__captions={name: 0.5},
        data__filters={"fields": {name: {"one_of": words}}},
        engine__deepspeed={"x": [1.5, None, name + "x"]},
    )
    again = recipe_from_dict(parse_yaml(dump_recipe(recipe)))
    assert again == recipe
    assert list(map(type, again.data.filters.fields[name].one_of)) == list(map(type, words))


ALIASES = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIASES, "aliases repeat more than"),
        ("a: &a {k: v}\nb: {<<: [*c]}", "undefined alias"),
        ("run: &a [*a]", "line 1: an alias inside of what it names"),
        ("a: &x 1\n" + "\n".join(f"b{n}: &b{n} [*b{n - 1}]" for n in range(1, 9)), "undefined"),
        ("[" * 20_000, "nested too deeply"),
        ("{a: " * 20_000, "nested too deeply"),
        ("run: {name: a}\nmodel: {}\nrun: {name: b}", "line 3: the key run is there twice"),
        ("run: {name: a, name: b}", "the key name is there twice"),
        ("run:\n\tname: a", "line 2: while scanning for the next token, found character '\\t'"),
        ("run: a\0b", "not a text in UTF-8"),
        ("run: !!python/object/apply:os.system [touch x]", "could not determine a constructor"),
        ("run: !!timestamp 2024-01-01", "could not determine a constructor"),
        ("run: !!int no", "is no int"),
        ("run: !!bool [a]", "is no bool"),
        ("run: {? [a] : b}", "unhashable key"),
        ("run: 1" + "0" * 5000, "a number of 5001 digits"),
        ("run: 0x" + "f" * 5000, "a number of 5002 digits"),
        ("--- 1\n--- 2", "expected a single document"),
        ("- run", "a mapping of sections, this is a list"),
        ("", "this is empty"),
        ("1: {}", "1: keys should be strings"),
        ("run: {1: x}", "run"),
        ("no: {}\n~: 1", ""),
        ("run: {name: 5}", "run.name: input should be a valid string, found 5; put it in quotes"),
    ],
)
def test_what_is_no_recipe_is_said_in_lines(tmp_path, text, message):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert message in str(caught.value)
    assert all(line.startswith(str(file)) for line in str(caught.value).splitlines())
    assert len(str(caught.value)) < 2000
    with pytest.raises(RecipeError):
        load_recipe(TINY, [f"run={text}"])


def test_files_of_other_encodings(tmp_path):
    file, text = tmp_path / "r.yaml", Path(TINY).read_text()
    for encoding in ("utf-8-sig", "utf-16"):
        file.write_bytes(text.encode(encoding))
        assert load_recipe(file) == load_recipe(TINY)
    file.write_bytes(text.encode() + b"# caf\xe9\n")
    with pytest.raises(RecipeError, match="not a text in UTF-8"):
        load_recipe(file)


def test_anchors_and_merge_keys_are_still_there():
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]"
    assert parse_yaml(text)["b"] == {"x": 1, "y": 3}


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    return str(tmp_path)


def path_keys(section, prefix=""):
    """Dotted names of all keys of a recipe that are paths."""
    for key, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from path_keys(kind, f"{prefix}{key}.")
        elif "with_home" in repr(kind) + repr(field.metadata):
            yield prefix + key


def test_home_is_written_out_in_every_path(home):
    keys = set(path_keys(Recipe)) | {"data.train", "data.val"}
    assert keys == {
        *("run.dir", "model.name", "model.pretrained", "data.train", "data.val", "data.cache_dir"),
        *(
            "checkpoint.resume",
            "checkpoint.local_dir",
            "checkpoint.mirror",
            "eval.zeroshot",
            "eval.classnames",
            "eval.templates",
        ),
        *("loss.distill.teacher", "loss.distill.config"),
    }
    assert PathText.__metadata__[0].func is with_home
    raw = load_recipe(TINY, [f"{key}=~/x/y" for key in sorted(keys)]).model_dump()
    for key in keys:
        value = reduce(getitem, key.split("."), raw)
        assert value == f"{home}/x/y" or value[0]["shards"] == f"{home}/x/y"
    sources = "[~/a.tar, {shards: [~/b.tar, '{~/c,/d}/{0..9}.tar'], weight: 2.0}]"
    train = load_recipe(TINY, [f"data.train={sources}"]).data.train
    assert train[0].shards == f"{home}/a.tar"
    assert train[1].shards == [f"{home}/b.tar", f"{{{home}/c,/d}}/{{0..9}}.tar"]


@pytest.mark.parametrize(
    "place",
    [
        *("https://host/~me/x.tar", "s3://b/~/x", "pipe:cat ~/x.tar", "a/~/b", "a~", "hf-hub:a/~b"),
        *("~nobody-of-that-name/x", "file://~/x", "{a,b}/~/c", "coca_ViT-L-14"),
    ],
)
def test_what_is_no_home_stays(home, place):
    assert with_home(place) == place
    assert load_recipe(TINY, [f"model.pretrained='{place}'"]).model.pretrained == place
