"""A checkpoint of another run is refused by name; what may change in a run is said."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from coca_scale.errors import UserError
from coca_scale.recipe import Recipe
from coca_scale.training.identity import KEYS, Key, compare
from tests.conftest import tiny_recipe
from tests.data.shards import write_shards
from tests.distributed.launching import start
from tests.json_lines import curve
from tests.training.identities import HERE, is_of
from tests.variants import raw_config


def notes_of(before, after, **ranks):
    return compare(HERE, is_of(before)[0], *is_of(after, **ranks)[1])


def refusal(before, after):
    with pytest.raises(UserError) as caught:
        notes_of(before, after)
    message = str(caught.value)
    assert message.startswith(f"{HERE} is of another run: ")
    assert f"model.pretrained={HERE}" in message and "\n" not in message
    return message


def test_every_key_of_a_recipe_is_judged():
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    keys = {f"{name}.{key}" for name, kind in sections.items() for key in kind.model_fields}
    assert KEYS.keys() == keys


@pytest.fixture(scope="module")
def saved():
    return is_of(tiny_recipe())


@pytest.mark.parametrize("key", KEYS)
def test_no_key_changes_in_silence(key, saved):
    before = {**saved[0], "identity": json.loads(json.dumps(saved[0]["identity"]))}
    before["identity"]["recipe"][key] = "something else"
    if KEYS[key] is Key.FIXED:
        with pytest.raises(UserError, match=rf"{key} something else → "):
            compare(HERE, before, *saved[1])
    else:
        told = " ".join(compare(HERE, before, *saved[1]))
        assert (f"{key} something else → " in told) == (KEYS[key] is not Key.START)


def test_the_same_run_has_nothing_to_say(saved):
    assert compare(HERE, saved[0], *saved[1]) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model__context_length": 20}, "model.context_length 16 → 20"),
        ({"model__image_size": 32}, "model.image_size 48 → 32"),
        ({"train__global_batch": 32}, "train.global_batch 16 → 32"),
        ({"data__lanes": 4}, "data.lanes 16 → 4"),
        ({"run__seed": 1}, "run.seed 0 → 1"),
        ({"loss__caption_weight": 0.0}, "loss.caption_weight 2.0 → 0.0"),
        ({"model__lock_image": True}, "model.lock_image false → true"),
        ({"data__train": "synthetic://shapes?count=500&size=48"}, "data.train: other"),
        ({"data__train": "synthetic://shapes?count=512&size=64"}, "the first samples are others"),
    ],
)
def test_what_makes_it_another_run(changes, told, saved):
    assert told in refusal(tiny_recipe(), tiny_recipe(**changes))


def test_what_may_change_is_said(saved):
    after = tiny_recipe(
        optim__lr=5e-4, train__steps=9, train__micro_batch=4, data__workers=1, eval__samples=4
    )
    (told,) = compare(HERE, saved[0], *is_of(after, ranks=4)[1])
    assert told.startswith(f"changed since {HERE.name}: ")
    for line in ("optim.lr 0.001 → 0.0005", "train.steps 4 → 9", "ranks 2 → 4", "data.workers 0 →"):
        assert line in told


@pytest.mark.parametrize(
    ("field", "value"),
    [("text_cfg__heads", 8), ("multimodal_cfg__heads", 8), ("vision_cfg__head_width", 16)],
)
def test_weights_of_the_same_shapes_may_be_of_another_model(field, value, saved, tmp_path):
    other = tmp_path / "heads.json"
    other.write_text(json.dumps(raw_config("coca_tiny", **{field: value})))
    told = refusal(tiny_recipe(), tiny_recipe(model__name=str(other)))
    assert f"model.name ({field.replace('__', '.')})" in told


def test_a_config_under_another_name_is_the_same_model(tmp_path):
    same = tmp_path / "same.json"
    same.write_text(json.dumps(raw_config("coca_tiny")))
    (told,) = notes_of(tiny_recipe(), tiny_recipe(model__name=str(same)))
    assert "model.name coca_tiny → " in told


def test_another_tokenizer_of_the_same_size_is_refused(saved):
    before = {**saved[0], "identity": {**saved[0]["identity"], "tokenizer": "0" * 64}}
    with pytest.raises(UserError, match="the tokenizer makes other tokens"):
        compare(HERE, before, *saved[1])


def test_a_checkpoint_that_says_less_still_has_its_model(saved):
    old = {key: value for key, value in saved[0].items() if key != "identity"}
    assert compare(HERE, old, *saved[1]) == []
    with pytest.raises(UserError, match=r"model\.context_length 16 → 20"):
        compare(HERE, old, *is_of(tiny_recipe(model__context_length=20))[1])


def test_a_recipe_that_did_not_know_a_key_meant_its_default(saved):
    identity = {**saved[0]["identity"]}
    identity["recipe"] = {k: v for k, v in identity["recipe"].items() if k != "loss.z_loss"}
    before = {**saved[0], "identity": identity}
    assert compare(HERE, before, *saved[1]) == []
    with pytest.raises(UserError, match=r"loss\.z_loss 0\.0 → 0\.1"):
        compare(HERE, before, *is_of(tiny_recipe(loss__z_loss=0.1))[1])


def shards(folder, sizes=(8, 8)):
    folder.mkdir()
    write_shards(folder, sizes)
    return tiny_recipe(data__train=str(folder))


def test_data_that_moved_is_told_from_other_data(tmp_path):
    before = shards(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    there = tiny_recipe(data__train=str(tmp_path / "b"))
    changed, moved = notes_of(before, there)
    assert "data.train has moved" in moved and "data.train" in changed
    assert "data.train" in refusal(before, shards(tmp_path / "more", (8, 8, 8)))
    (tmp_path / "b" / "manifest.json").unlink(missing_ok=True)
    names = sorted(p.name for p in (tmp_path / "b").glob("*.tar"))
    old, new = (tmp_path / "b" / name for name in reversed(names))
    shutil.copy(new, old), shutil.copy(tmp_path / "a" / names[1], new)
    assert "data.train" in refusal(before, there)


def test_other_pictures_in_the_same_place_are_warned_of(tmp_path):
    recipe = shards(tmp_path / "a")
    before = is_of(recipe)[0]
    first, second = sorted((tmp_path / "a").glob("*.tar"))
    shutil.copy(second, first)
    (told,) = compare(HERE, before, *is_of(recipe)[1])
    assert told.startswith("warning: the first samples of data.train")


@pytest.mark.slow
def test_a_run_goes_on_as_what_it_is_or_not_at_all(tmp_path):
    base = tmp_path / "base"
    job = start(base, "train.steps=3")
    assert job.wait() == 0, job.output[-3000:]
    heads = tmp_path / "heads.json"
    heads.write_text(json.dumps(raw_config("coca_tiny", text_cfg__heads=8)))
    checkpoints = sorted(p.name for p in (base / "checkpoints").rglob("*"))
    written = (base / "recipe.yaml").read_text()
    for change, told in (
        (f"model.name={heads}", "model.name (text_cfg.heads) "),
        ("model.context_length=20", "model.context_length 16 → 20"),
    ):
        again = start(base, "train.steps=6", change)
        assert again.wait() == 1
        assert again.output.count(told) == 1
        assert "Traceback" not in again.output
        assert sorted(p.name for p in (base / "checkpoints").rglob("*")) == checkpoints
        assert (base / "recipe.yaml").read_text() == written
    more = start(base, "train.steps=6", "optim.weight_decay=0.3", "engine.offload=optimizer")
    assert more.wait() == 0, more.output[-3000:]
    assert "optim.weight_decay 0.05 → 0.3" in more.output
    assert len(curve(base, 6)) == 6
    state = next(
        (base / "checkpoints" / "step_00000006" / "state").glob("*rank_0_*optim_states.pt")
    )
    groups = torch.load(state, weights_only=False)["optimizer_state_dict"]["optimizer_state_dict"]
    assert {g["weight_decay"] for g in groups["param_groups"]} == {0.3, 0.0}, "said and done"
