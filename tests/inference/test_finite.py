"""Numbers that are none are met before they become scores and captions."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from coca_scale.errors import UserError
from coca_scale.inference.load import load_model
from coca_scale.model import CoCa, LogitScale, load_model_config
from coca_scale.model.weights import load_coca, require_finite
from coca_scale.openclip.folder import SAFETENSORS_FILE, write_folder
from tests.conftest import tiny_recipe
from tests.invoke import mistake_in
from tests.ranks import on_ranks
from tests.variants import untrained_export, weights_of

PICTURES = "synthetic://shapes?split=val&count=16&size=48"


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return untrained_export(tmp_path_factory.mktemp("export"))


def broken(export, folder, value, name="visual.conv1.weight"):
    """A copy of the export in which one number of one weight is another."""
    folder.mkdir()
    for file in export.iterdir():
        if not file.name.endswith(".bin"):
            (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / SAFETENSORS_FILE)
    weights[name].flatten()[-1] = value
    save_file(weights, folder / SAFETENSORS_FILE)
    return folder


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["visual.conv1.weight", "logit_scale"])
def test_no_model_is_made_of_them(export, tmp_path, value, name):
    folder = broken(export, tmp_path / "broken", value, name)
    weights = load_file(folder / SAFETENSORS_FILE)
    torch.save({"state_dict": {f"module.{n}": t for n, t in weights.items()}}, tmp_path / "e.pt")
    save_file({n: t.half() for n, t in weights.items()}, tmp_path / "half.safetensors")
    for model in (
        folder,
        folder / SAFETENSORS_FILE,
        tmp_path / "e.pt",
        tmp_path / "half.safetensors",
    ):
        with pytest.raises(UserError, match="1 of 157 weights hold NaN or infinity") as caught:
            load_model(str(model), "coca_tiny")
        assert str(model) in str(caught.value) and "\n" not in str(caught.value)


def test_a_logit_scale_that_overflows_is_none(export, tmp_path):
    folder = broken(export, tmp_path / "broken", 200.0, "logit_scale")
    with pytest.raises(UserError, match=r"NaN or infinity \(first: logit_scale"):
        load_model(str(folder))


def test_the_verbs_and_a_run_say_so(export, tmp_path):
    folder = str(broken(export, tmp_path / "broken", torch.nan))
    for verb in (
        ["eval", "retrieval", folder, PICTURES],
        ["caption", folder, PICTURES, "--out", str(tmp_path / "captions.jsonl")],
        ["export", folder, "--out", str(tmp_path / "again")],
    ):
        assert "hold NaN or infinity" in mistake_in(*verb)
    assert not (tmp_path / "captions.jsonl").exists() and not (tmp_path / "again").exists()
    recipe = tiny_recipe(run__dir=str(tmp_path / "run"), model__pretrained=folder)
    for message in on_ranks(begun, 2, recipe):
        assert f"model.pretrained={folder}" in message and "hold NaN or infinity" in message


def begun(_rank, _ranks, recipe):
    from coca_scale.engine.launch import start_world
    from coca_scale.errors import AgreedError
    from coca_scale.training.trainer import Trainer

    world = start_world()
    try:
        Trainer(recipe, world)
    except AgreedError as error:
        return str(error)
    return None


def overflowing(config, name):
    """A model whose weights are finite and whose numbers are not."""
    weights = weights_of(CoCa(config))
    weights[name] = torch.full_like(weights[name], 3e38)
    return weights


@pytest.mark.parametrize(
    ("name", "message"),
    [("image.projection", "16 of 16 pictures"), ("text.projection", "16 of 16 captions")],
)
def test_features_that_overflow_are_not_scored(tmp_path, name, message):
    config = load_model_config("coca_tiny")
    write_folder(overflowing(config, name), config, tmp_path / "model")
    said = mistake_in("eval", "retrieval", tmp_path / "model", PICTURES)
    assert f"NaN or infinity for {message}" in said


@pytest.mark.parametrize("method", ["beam", "greedy", "top-p"])
def test_captions_of_numbers_that_overflow_are_not_written(tmp_path, method):
    config = load_model_config("coca_tiny")
    write_folder(overflowing(config, "decoder.norm_final.weight"), config, tmp_path / "model")
    options = ["--out", tmp_path / "captions.jsonl", "--method", method]
    said = mistake_in("caption", tmp_path / "model", PICTURES, *options)
    assert "NaN or infinity for a caption's next token" in said


def test_nothing_is_copied_to_look_at_it():
    """An expanded tensor of a petabyte would be, if anything were copied; shapes come first."""
    weights = weights_of(CoCa(load_model_config("coca_tiny")))
    weights["image.projection"] = torch.zeros(1).expand(2**24, 2**24)
    with pytest.raises(UserError, match=r"image\.projection has shape"):
        load_coca(load_model_config("coca_tiny"), LogitScale(), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_whole_numbers_and_nothing_at_all_are_finite(dtype):
    good = {"a": torch.ones(2, dtype=dtype), "b": torch.tensor([3]), "c": torch.zeros(0)}
    require_finite(good)
    for value in (torch.nan, -torch.inf):
        with pytest.raises(UserError, match=r"1 of 4 .*first: d\)"):
            require_finite({**good, "d": torch.tensor([1.0, value, 2.0]).to(dtype)})
