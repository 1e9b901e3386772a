"""What of a recipe leaves the machine: a secret in any of its texts does not, known names do."""

from __future__ import annotations

import json
from typing import Any, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip import list_pretrained

from coca_scale.model.config import available_models
from coca_scale.recipe import Recipe, load_recipe, recipe_from_dict
from coca_scale.recipe.public import (
    PRIVATE,
    public_cause,
    public_commit,
    public_hub_name,
    public_name,
    public_recipe,
    public_text,
    public_versions,
)
from coca_scale.recipe.section import Section
from tests.secrets import PLACES, SECRETS, SHAPES, recipe_with


def texts(section: type[Section], prefix: str = "") -> set[str]:
    """Dotted names of all keys of a recipe in which there can be text of one's own."""
    found = set()
    for key, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found |= texts(kind, f"{prefix}{key}.")
        elif _has_text(kind):
            found.add(prefix + key)
    return found


def _has_text(kind: Any) -> bool:
    if isinstance(kind, type) and issubclass(kind, Section):
        return bool(texts(kind))
    return kind in (str, Any) or (
        any(map(_has_text, get_args(kind))) and "Literal" not in str(get_origin(kind))
    )


def test_every_text_of_a_recipe_is_tried():
    # one of Python's names, or an error; numbers and shares of steps, or an error
    known = {"data.encoding", "loss.contrastive_weight", "loss.caption_weight"}
    assert set(PLACES) | known == texts(Recipe)


@settings(max_examples=80, deadline=None)
@given(secret=SECRETS, shape=st.sampled_from(SHAPES))
def test_a_secret_in_any_text_does_not_leave(secret, shape):
    recipe = recipe_with(shape.replace("{}", secret)).model_dump()
    assert json.dumps(recipe).count(secret) >= len(PLACES)
    shown = public_recipe(recipe)
    assert secret.lower() not in json.dumps(shown).lower()
    assert recipe_from_dict(shown).train == recipe_from_dict(recipe).train, "still a recipe"
    for private in ("/mnt", "/home/", "node17", "hunter2", "AKIA", "10.0.0.7", "C:\\\\"):
        assert private not in json.dumps(shown)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/data/laion2b-{00000..99999}.tar", "laion2b-{00000..99999}.tar"),
        ("s3://bucket/cc12m-train-{0000..2175}.tar", "cc12m-train-{0000..2175}.tar"),
        ("https://me:pw@host/coco/val2014.tar?key=1", PRIVATE),
        ("simplecache::https://me:pw@host/{00000..41407}.tar", "{00000..41407}.tar"),
        ("/data/acme-customers-{000..999}.tar", "(private).tar"),
        ("~/data/train.csv", "train.csv"),
        ("{/mnt/a/x.tar,/mnt/b/coco.tar}", PRIVATE),
        ("pipe:aws s3 cp s3://b/a.tar -", PRIVATE),
        ("\\\\server\\share\\me", PRIVATE),
        ("hf-hub:laion/CoCa-ViT-L-14-laion2B-s13B-b90k", None),
        ("hf-hub:acme/secret-project", PRIVATE),
        ("coca_ViT-L-14@laion2b_s13b_b90k", None),
        ("synthetic://shapes?count=3&seed=1", None),
        ("synthetic://shapes?count=hunter2", PRIVATE),
        *(
            (word, None)
            for word in ("filepath", "title", "auto", "never", "imagenet", "openai", "")
        ),
        ("1234-5678-9012", PRIVATE),
        ("K=V", PRIVATE),
    ],
)
def test_what_is_shown_of_a_text(text, shown):
    assert public_text(text) == (text if shown is None else shown)


def test_published_models_keep_their_names():
    names = {*available_models(), *(name for pair in list_pretrained() for name in pair)}
    assert [name for name in names if public_text(name) != name] == ["v1"], "which says nothing"


def test_shipped_recipes_lose_nothing_but_their_folders():
    recipe = load_recipe("recipes/large.yaml", ["engine.deepspeed.zero_optimization={a_b: auto}"])
    before = recipe.model_dump()
    shown = public_recipe(before)
    assert shown["engine"]["deepspeed"] == {"zero_optimization": {PRIVATE: "auto"}}
    for section, keys in before.items():
        for key, value in keys.items():
            if (section, key) not in {("data", "train"), ("data", "val"), ("engine", "deepspeed")}:
                assert shown[section][key] == value, (section, key)


def test_fields_of_ones_own_stay_apart():
    recipe = load_recipe("recipes/tiny.yaml", ["data.captions={acme: 0.5, emca: 0.25, txt: 0.25}"])
    captions = public_recipe(recipe.model_dump())["data"]["captions"]
    assert captions == {PRIVATE: 0.5, f"{PRIVATE} 1": 0.25, "txt": 0.25}


def test_names_and_facts_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert-own").mkdir()
    for name in ("coca_b32 lr1e-3 (second)", "größer.v2", "tiny"):
        assert public_name(name) == name
    for name in (
        "/home/me/run",
        "a@b",
        "k=v",
        "hf_" + "aB" * 17,
        "AKIAIOSFODNN7EXAMPLE",
        "",
        "a\nb",
    ):
        assert public_name(name) == PRIVATE
    for name in (
        "roberta-base",
        "FacebookAI/roberta-base",
        "vit_base_patch16_224",
        "hf-hub:timm/x",
    ):
        assert public_hub_name(name) == name
    for name in ("bert-own", "/models/x", "./x", "a/b/c", "https://h/x", "~/x", "../x"):
        assert public_hub_name(name) == PRIVATE
    about = {
        "versions": {
            "torch": "2.15.0+cu128",
            "python": "/usr/bin",
            "a": "0A00000000000000QQ",
            "node17": "1.0",
        }
    }
    assert public_versions(about) == {"torch": "2.15.0+cu128", PRIVATE: "1.0"}
    assert public_versions({}) == public_versions({"versions": None}) == {}
    assert public_commit({"git_commit": "0bd4e9f4cce8"}) == "0bd4e9f4cce8"
    assert public_commit({"git_commit": "/home/me"}) == public_commit({}) == "unknown"
    assert public_cause("broken_image") == "broken_image"
    assert public_cause("filtered_min_side") == "filtered_min_side"
    assert public_cause("filtered_acme") == "filtered_(private)"
    assert public_cause("cannot read /home/me") == public_cause(None) == PRIVATE
