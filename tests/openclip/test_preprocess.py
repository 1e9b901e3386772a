"""How pictures become pixels, and QuickGELU: what comes with weights beside their model config."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import shutil
from collections import Counter

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip import pretrained as registry
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from webdataset import TarWriter

from coca_scale.data.listing import ListOptions
from coca_scale.engine.world import World
from coca_scale.errors import UserError
from coca_scale.evaluation.encoder import loaded_encoder
from coca_scale.evaluation.pictures import open_pictures, read_pictures
from coca_scale.inference.export import export
from coca_scale.inference.load import find_model, load_model
from coca_scale.model import CoCa, load_model_config
from coca_scale.model.config import parse_model_config
from coca_scale.openclip.folder import CONFIG_FILE, SAFETENSORS_FILE, write_folder
from tests.conftest import tiny_recipe
from tests.ranks import on_ranks, quiet
from tests.variants import raw_config, weights_of

HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
ODD = {**HALF, "resize_mode": "squash", "interpolation": "bilinear"}
PIXELS = ("mean", "std", "interpolation", "resize_mode")


def facts(entry):
    """What of a registry entry says how pictures become pixels."""
    return {key: list(v) if isinstance(v := entry[key], tuple) else v for key in PIXELS}


def all_entries():
    return [(m, t, registry.get_pretrained_cfg(m, t)) for m, t in registry.list_pretrained()]


DISTINCT = list({json.dumps(facts(entry)): facts(entry) for *_, entry in all_entries()}.values())


def picture(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """An export of coca_tiny with random weights."""
    folder = tmp_path_factory.mktemp("start") / "export"
    torch.manual_seed(0)
    config = load_model_config("coca_tiny")
    write_folder(weights_of(CoCa(config)), config, folder)
    return folder


def changed(start, folder, preprocess, **model):
    """A copy of an export whose config says something else."""
    shutil.copytree(start, folder)
    content = json.loads((folder / CONFIG_FILE).read_text())
    content["preprocess_cfg"] |= preprocess
    content["model_cfg"] |= model
    (folder / CONFIG_FILE).write_text(json.dumps(content))
    return folder


@torch.no_grad()
def theirs(model, pictures, **options):
    """Unit features of pictures, by open_clip alone."""
    built, _, transform = open_clip.create_model_and_transforms(model, **options)
    images = torch.stack([transform(picture) for picture in pictures])
    return built.eval().encode_image(images, normalize=True)


def ours(loaded, pictures):
    return loaded.encode_image(torch.stack([loaded.preprocess(p) for p in pictures]))


def written(folder):
    return json.loads((folder / CONFIG_FILE).read_text())["preprocess_cfg"]


@pytest.mark.parametrize("preprocess", [*DISTINCT, {"resize_mode": "longest", "fill_color": 200}])
def test_an_export_keeps_what_it_came_with(start, tmp_path, preprocess):
    folder = changed(start, tmp_path / "model", preprocess)
    pictures = [picture(70, 40), picture(33, 90, seed=1)]
    expected = theirs(f"local-dir:{folder}", pictures)
    loaded = load_model(str(folder))
    assert torch.allclose(ours(loaded, pictures), expected, atol=1e-5)
    export(loaded, tmp_path / "again")
    assert written(tmp_path / "again").items() >= preprocess.items()
    assert torch.allclose(theirs(f"local-dir:{tmp_path / 'again'}", pictures), expected, atol=1e-6)


def test_evaluations_see_what_the_model_was_trained_on(start, tmp_path):
    folder = changed(start, tmp_path / "model", ODD)
    pictures = [picture(70, 40), picture(33, 90, seed=1)]
    for number, one in enumerate(pictures):
        one.save(tmp_path / f"{number}.png")
    encoder = loaded_encoder(load_model(str(folder)), World.alone(torch.device("cpu")))
    names = [str(tmp_path / f"{number}.png") for number in (0, 1)]
    (part,) = open_pictures(names, tiny_recipe().data, ListOptions())
    read = list(read_pictures([part], encoder.config, bad=Counter()))
    features = encoder.encode_images(torch.stack([found.pixels for found in read]))
    assert torch.allclose(features, theirs(f"local-dir:{folder}", pictures), atol=1e-5)


@pytest.fixture(scope="module")
def prepared(start):
    """A picture as a model prepares it whose config file says what is given."""
    loaded, file = load_model(str(start)), start.parent / "config.json"

    def prepare(image, image_size, preprocess):
        model = raw_config("coca_tiny", vision_cfg__image_size=image_size)
        file.write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))
        return dataclasses.replace(loaded, config=load_model_config(str(file))).preprocess(image)

    return prepare


SIDES = st.integers(12, 200)  # OpenCLIP cannot take one that rounds to nothing
UNIT = st.floats(0, 1, width=32)


@settings(deadline=None, max_examples=150)
@given(
    st.tuples(SIDES, SIDES),
    st.sampled_from([16, 40, 48]),
    st.fixed_dictionaries(
        {},
        optional={
            "mean": st.lists(UNIT, min_size=3, max_size=3) | UNIT | UNIT.map(lambda v: [v]),
            "std": st.lists(st.floats(2**-8, 1, width=32), min_size=3, max_size=3),
            "interpolation": st.sampled_from(["bicubic", "bilinear", "random", "", None]),
            "resize_mode": st.sampled_from(["shortest", "longest", "squash", None]),
            "fill_color": st.integers(0, 255),
            "size": st.sampled_from([7, [3, 224, 224], None]),
            "crop_pct": st.floats(0, 1),
        },
    ),
)
def test_pixels_are_openclips(prepared, sides, image_size, preprocess):
    merged = merge_preprocess_dict(PreprocessCfg(), preprocess) | {"size": image_size}
    image = picture(*sides)
    expected = image_transform_v2(PreprocessCfg(**merged), is_train=False)(image)
    found = prepared(image, image_size, preprocess)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)  # a pixel is 0.004 or more


def test_the_whole_registry_is_read_as_openclip_reads_it():
    from coca_scale.openclip.hub import registry_facts

    entries = all_entries()
    assert {entry["mean"] for *_, entry in entries} > {(0.5, 0.5, 0.5)}
    for model, tag, entry in entries:
        said = registry_facts(model, tag)
        config = parse_model_config({**raw_config("clip_tiny"), **said}, tag)
        merged = merge_preprocess_dict(PreprocessCfg(), entry)
        found = config.preprocess_cfg.model_dump()
        assert found == {key: merged[key] for key in found}, (model, tag)
        assert merged.keys() - found.keys() == {"size"}
        assert config.quick_gelu == entry.get("quick_gelu", False), (model, tag)


@pytest.fixture
def entries(start, tmp_path, monkeypatch):
    """coca_tiny in OpenCLIP's registry, its weights in the cache of the Hugging Face hub."""
    raw = json.loads((start / CONFIG_FILE).read_text())["model_cfg"]
    (tmp_path / "coca_tiny.json").write_text(json.dumps(raw))
    monkeypatch.setattr(
        open_clip.factory, "_MODEL_CONFIGS", copy.copy(open_clip.factory._MODEL_CONFIGS)
    )
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [tmp_path / "coca_tiny.json"])
    open_clip.factory._rescan_model_configs()
    tags = {
        "odd": registry._slpcfg(interpolation="bilinear"),
        "openai": registry._pcfg(quick_gelu=True),
    }
    for entry in tags.values():
        entry["file"] = str(start / SAFETENSORS_FILE)
    monkeypatch.setitem(registry._PRETRAINED, "coca_tiny", tags)


def test_registry_entries_give_openclips_features(entries):
    pictures = [picture(70, 40), picture(33, 90, seed=1)]
    for tag in ("odd", "openai"):
        options = {"pretrained": tag, "force_quick_gelu": tag == "openai"}
        expected = theirs("coca_tiny", pictures, **options)
        found = ours(load_model(f"coca_tiny@{tag}"), pictures)
        assert torch.allclose(found, expected, atol=1e-5), tag


def test_a_weight_file_goes_by_the_config_beside_it(start, tmp_path):
    folder = changed(start, tmp_path / "model", ODD, quick_gelu=True)
    alone = shutil.copy(folder / SAFETENSORS_FILE, tmp_path / "alone.safetensors")
    found = find_model(str(folder / SAFETENSORS_FILE), "coca_tiny").config
    assert found == load_model_config(str(folder / CONFIG_FILE))
    assert find_model(str(alone), "coca_tiny").config == load_model_config("coca_tiny")


@pytest.mark.parametrize(
    ("preprocess", "message"),
    [
        ({"interpolation": "lanczos"}, "interpolation: .*'bicubic', 'bilinear' or 'random'"),
        ({"resize_mode": "crop"}, "resize_mode: .*'shortest', 'longest' or 'squash'"),
        ({"mode": "L"}, "mode: .*'RGB'"),
        ({"mean": [0.5, 116.3, 0.5]}, "mean.1: .*less than or equal to 1"),
        ({"mean": [0.5, 0.5]}, "mean: should be one number"),
        ({"mean": [float("nan"), 0.5, 0.5]}, "mean.0: "),
        ({"mean": [0.5, True, 0.5]}, "mean.1: "),
        ({"std": [0.5, 0.0, 0.5]}, "std.1: .*greater than or equal to 0.0001"),
        ({"std": [1e-320, 0.5, 0.5]}, "std.0: .*greater than or equal to"),
        ({"std": [{"r": 0.5}, 0.5, 0.5]}, "std.0: .*valid number"),
        ({"fill_color": 256}, "fill_color: "),
        ({"fill_color": [1, 2, 3]}, "fill_color: "),
        ([0.5], "preprocess_cfg: should be an object"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(start, tmp_path, preprocess, message):
    content = json.loads((start / CONFIG_FILE).read_text()) | {"preprocess_cfg": preprocess}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{CONFIG_FILE}.*{message}") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
FIELDS = st.sampled_from(["mode", "mean", "std", "interpolation", "resize_mode", "fill_color"])


@given(JSON | st.dictionaries(FIELDS, JSON))
def test_any_preprocess_cfg_is_a_config_or_one_fault(preprocess):
    raw = {**raw_config("coca_tiny"), "preprocess_cfg": preprocess}
    try:
        config = parse_model_config(raw, "x")
    except UserError:
        return
    assert parse_model_config(json.loads(json.dumps(config.to_dict())), "x") == config


def start_and_go_on(_rank, _ranks, recipes):
    """Of each run: what its first batch looks like to the towers, and what it says at its start."""
    from coca_scale.engine.launch import start_world
    from coca_scale.errors import AgreedError
    from coca_scale.training.trainer import Trainer

    world, found = start_world(), []
    for recipe in recipes:
        try:
            with quiet():
                trainer = Trainer(recipe, world)
                batch = next(iter(trainer.prepared.loader(trainer.lanes)))
                found.append((trainer.engine.prepare(batch.images), trainer.setup.notes))
                trainer.run()
                trainer.engine.close()
        except AgreedError as error:
            found.append((None, [str(error)]))
    return found


def write_pictures(shard, pictures):
    with TarWriter(str(shard)) as writer:
        for number, one in enumerate(pictures):
            data = io.BytesIO()
            one.save(data, "PNG")
            writer.write({"__key__": str(number), "png": data.getvalue(), "txt": "a picture"})


def shows(seen, pictures, preprocess):
    """Whether what a tower saw is these pictures and no others, as OpenCLIP prepares them."""
    merged = merge_preprocess_dict(PreprocessCfg(size=48), preprocess)
    transform = image_transform_v2(PreprocessCfg(**merged), is_train=False)
    expected = torch.stack([transform(one) for one in pictures])
    distances = (seen[:, None] - expected).abs().amax((2, 3, 4))
    return bool((distances.amin(1) < 1e-5).all() and (distances.amin(0) < 1e-5).all())


@pytest.mark.slow
def test_a_run_trains_on_what_its_weights_know_and_says_so(start, tmp_path):
    pictures = [picture(70 + 3 * n, 40, seed=n) for n in range(8)]
    write_pictures(tmp_path / "train.tar", pictures)
    common = {"data__train": str(tmp_path / "train.tar"), "data__crop_scale_min": 1.0}
    common |= {"model__pretrained": str(changed(start, tmp_path / "odd", ODD, quick_gelu=True))}
    common |= {"data__lanes": 1, "run__dir": str(tmp_path / "run")}
    own, other = tmp_path / "own.json", tmp_path / "other.json"
    for file, mode in ((own, "longest"), (other, "shortest")):
        says = {"preprocess_cfg": {"resize_mode": mode}}
        file.write_text(json.dumps({**raw_config("coca_tiny"), **says}))
    chosen = common | {"model__name": str(own), "run__dir": str(tmp_path / "chosen")}
    recipes = [
        tiny_recipe(**common, train__steps=1, data__val=str(tmp_path / "train.tar")),
        tiny_recipe(**common, train__steps=2),  # goes on
        tiny_recipe(**chosen, train__steps=1),
        tiny_recipe(**chosen | {"model__name": str(other)}, train__steps=2),
    ]
    begun, resumed, own_way, refused = on_ranks(start_and_go_on, 1, recipes)[0]
    assert shows(begun[0], pictures, ODD)
    assert "the weights were trained with QuickGELU" in begun[1]
    assert any(line.startswith("pictures as the weights were trained: ") for line in begun[1])
    assert shows(resumed[0], pictures, ODD)
    assert shows(own_way[0], pictures, ODD | {"resize_mode": "longest"})
    assert any(line.startswith(f"warning: {own} has preprocess_cfg ") for line in own_way[1])
    (fault,) = refused[1]
    assert "resize_mode) longest → shortest" in fault and "\n" not in fault

    run = tmp_path / "run"
    assert written(run / "export").items() >= ODD.items()
    expected = theirs(f"local-dir:{run / 'export'}", pictures)
    for name in (run, run / "export"):
        assert torch.allclose(ours(load_model(str(name)), pictures), expected, atol=1e-5)
