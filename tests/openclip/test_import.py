"""Weights from everywhere, and one line for everything that can be wrong with them."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from coca_scale.errors import UserError
from coca_scale.inference.load import find_model, load_model, pretrained_name
from coca_scale.model import CoCa, LogitScale, load_model_config
from coca_scale.model.pickles import read_pickle
from coca_scale.model.weights import LOGIT_BIAS, LOGIT_SCALE, fit_weights, load_coca
from coca_scale.openclip.folder import write_folder
from coca_scale.openclip.hub import registry_file
from coca_scale.openclip.state_dict import to_openclip
from coca_scale.openclip.weight_files import read_weight_file
from tests.conftest import tiny_recipe
from tests.disks import no_file_over
from tests.ranks import on_ranks
from tests.variants import config_file, variant, weights_of


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return weights_of(CoCa(load_model_config("coca_tiny")))


def files_of(weights, folder):
    """The same weights in every form people have them."""
    theirs = {name: tensor.clone() for name, tensor in to_openclip(weights).items()}
    save_file(theirs, folder / "w.safetensors")
    torch.save(theirs, folder / "w.bin")
    torch.save(theirs, folder / "old.pt", _use_new_zipfile_serialization=False)
    wrapped = {f"module.{name}": tensor for name, tensor in theirs.items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3}]}
    epoch = {"epoch": 7, "name": "run", "state_dict": wrapped, "optimizer": optimizer}
    torch.save(epoch, folder / "epoch_7.pt")
    return ["w.safetensors", "w.bin", "old.pt", "epoch_7.pt"]


def test_an_export_that_a_full_disk_ends_leaves_the_earlier_one(weights, tmp_path):
    config = load_model_config("coca_tiny")
    other = {name: tensor + 1 for name, tensor in weights.items()}
    for room in (0, 100, 100_000, 9_000_000):
        with no_file_over(room), pytest.raises(OSError, match="File too large"):
            write_folder(weights, config, tmp_path / "new")
        assert list((tmp_path / "new").iterdir()) == []
    write_folder(weights, config, tmp_path / "old")
    for room in (0, 100, 100_000, 9_000_000):
        with no_file_over(room), pytest.raises(OSError, match="File too large"):
            write_folder(other, config, tmp_path / "old")
        found = find_model(str(tmp_path / "old"))
        assert all(torch.equal(found.weights[n], t) for n, t in weights.items())
    write_folder(other, config, tmp_path / "old")
    modes = {path.stat().st_mode for path in (tmp_path / "old").iterdir()}
    assert len(modes) == 1, "others may read the weights as they may read the rest"


def test_every_kind_of_file_gives_the_same_model(weights, tmp_path):
    for name in files_of(weights, tmp_path):
        found = find_model(str(tmp_path / name), "coca_tiny")
        assert found.weights.keys() == weights.keys(), name
        assert all(torch.equal(found.weights[n], t) for n, t in weights.items()), name
    loaded = load_model(str(tmp_path / "epoch_7.pt"), "coca_tiny")
    assert loaded.encode_text(loaded.tokenizer("a red circle")).shape == (1, 128)


def test_a_bias_of_logits_comes_with_the_weights_or_begins_as_sigmoid_does(weights, tmp_path):
    plain = load_model_config("coca_tiny")
    sigmoid = plain.for_loss(tiny_recipe(loss__contrastive="sigmoid").loss)
    fitted, notes = fit_weights(weights, sigmoid)
    assert fitted[LOGIT_BIAS].tolist() == [-10.0]
    assert fitted[LOGIT_SCALE] is weights[LOGIT_SCALE]
    assert notes == ["logit_scale.bias: begins at -10, these weights have none"]
    learnt = {**weights, LOGIT_BIAS: torch.tensor([-7.5])}
    assert fit_weights(learnt, sigmoid) == (learnt, [])

    assert write_folder(learnt, sigmoid, tmp_path) is None
    loaded = load_model(str(tmp_path))
    assert loaded.weights.keys() == learnt.keys()
    assert loaded.model.logit_scale.bias.tolist() == [-7.5]
    theirs = open_clip.create_model(f"local-dir:{tmp_path}")
    assert theirs.logit_bias.item() == -7.5
    assert plain.for_weights_of(loaded.config) == sigmoid  # also where a run trains with softmax
    assert sigmoid.for_weights_of(plain) == sigmoid
    with pytest.raises(UserError, match=r"1 missing \(logit_scale.bias"):
        load_coca(sigmoid, LogitScale.of(sigmoid), weights)


def cached(monkeypatch, cache, repository, files):
    """Put files into a Hugging Face cache as a download would."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(snapshot.name)
    for name, content in files.items():
        (snapshot / name).write_bytes(content)
    return snapshot


def test_hub_models_come_from_the_cache(weights, tmp_path, monkeypatch):
    write_folder(weights, load_model_config("coca_tiny"), tmp_path / "export")
    files = {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()}
    cached(monkeypatch, tmp_path / "cache", "someone/coca", files)
    loaded = load_model("hf-hub:someone/coca")
    assert all(torch.equal(loaded.weights[name], t) for name, t in weights.items())
    theirs = open_clip.create_model("hf-hub:someone/coca").eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = theirs.encode_image(images)
    assert torch.allclose(loaded.encode_image(images), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "tag", "repository"),
    [
        ("coca_ViT-L-14", "laion2b_s13b_b90k", "laion/CoCa-ViT-L-14-laion2B-s13B-b90k"),
        (
            "coca_ViT-L-14",
            "mscoco_finetuned_laion2B-s13B-b90k",
            "laion/mscoco_finetuned_CoCa-ViT-L-14-laion2B-s13B-b90k",
        ),
        ("coca_ViT-B-32", "laion2b_s13b_b90k", "laion/CoCa-ViT-B-32-laion2B-s13B-b90k"),
    ],
)
def test_registry_names_of_the_guide(model, tag, repository, tmp_path, monkeypatch):
    files = {"open_clip_pytorch_model.bin": b"weights"}
    snapshot = cached(monkeypatch, tmp_path, repository, files)
    assert registry_file(model, tag) == snapshot / "open_clip_pytorch_model.bin"
    section = tiny_recipe(model__name=model, model__pretrained=tag).model
    assert pretrained_name(section) == f"{model}@{tag}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("coca_ViT-L-14@laion2b_s13b_b90k", "cannot be downloaded"),
        ("coca_ViT-L-14@laion2b_s13b_b9k", "did you mean laion2b_s13b_b90k"),
        ("coca_base@laion2b_s13b_b90k", "no weights for coca_base"),
        ("coca_ViT-L14@laion2b_s13b_b90k", "did you mean coca_ViT-L-14"),
        ("ViT-B-16-quickgelu@openai", "cannot be downloaded"),
        ("ViT-B-16@opanai", "did you mean openai"),
        ("hf-hub:nobody/nothing", "cannot be downloaded"),
        ("/nowhere/model.pt", "does not say what model it is"),
        ("nonsense", "no such folder or file"),
    ],
)
def test_names_that_lead_nowhere(name, message, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        find_model(name)
    assert "\n" not in str(caught.value)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/coca_scale_code_ran"),))


def test_damaged_and_dangerous_files(weights, tmp_path):
    files_of(weights, tmp_path)
    torch.save({"state_dict": weights, "extra": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="could run code"):
        read_weight_file(tmp_path / "evil.pt")
    assert not Path("/tmp/coca_scale_code_ran").exists()
    for name in ("w.safetensors", "w.bin", "old.pt", "epoch_7.pt"):
        whole = (tmp_path / name).read_bytes()
        for length in (len(whole) // 2, *range(5000, 5016)):  # within whatever is there
            (tmp_path / f"cut_{name}").write_bytes(whole[:length])
            with pytest.raises(UserError, match="cut short") as caught:
                read_weight_file(tmp_path / f"cut_{name}")
            assert "\n" not in str(caught.value)
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="git lfs pull"):
        read_weight_file(tmp_path / "pointer.safetensors")
    torch.save({"state_dict": {"a": 1}, "pad": torch.zeros(100)}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="'a' is a int, not a tensor"):
        read_weight_file(tmp_path / "odd.pt")
    torch.jit.trace(torch.nn.Linear(20, 20), torch.zeros(1, 20)).save(tmp_path / "script.pt")
    with pytest.raises(UserError, match="TorchScript program"):
        read_weight_file(tmp_path / "script.pt")
    torch.save([torch.zeros(100)], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds a list"):
        read_weight_file(tmp_path / "list.pt")


def test_weights_of_another_architecture(weights, tmp_path):
    config = load_model_config("coca_tiny")
    missing = {n: t for n, t in weights.items() if not n.startswith("decoder.blocks.1")}
    extra = {**weights, "decoder.blocks.9.norm1.weight": torch.zeros(128)}
    wide = {**weights, "image.projection": torch.zeros(128, 256)}
    for broken, message in (
        (missing, "12 missing .*decoder.blocks.1"),
        (extra, "1 unexpected .*decoder.blocks.9"),
        (wide, r"image.projection has shape \(128, 256\)"),
    ):
        with pytest.raises(UserError, match=message):
            load_coca(config, LogitScale(), broken)
    resnet = {"visual.layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}
    torch.save(resnet, tmp_path / "rn50.pt")
    with pytest.raises(UserError, match="belongs to no model of this package"):
        load_model(str(tmp_path / "rn50.pt"), "coca_tiny")


def start(_rank, _ranks, recipes):
    from coca_scale.engine.launch import start_world
    from coca_scale.errors import AgreedError
    from coca_scale.training.trainer import Trainer

    world, messages = start_world(), []
    for recipe in recipes:
        try:
            Trainer(recipe, world)
        except AgreedError as error:
            messages.append(str(error))
        else:
            messages.append("")
    return messages


def test_a_run_says_what_is_wrong_with_its_start_on_every_rank(weights, tmp_path):
    write_folder(weights, load_model_config("coca_tiny"), tmp_path / "start")
    files = {"model__pretrained": str(tmp_path / "start")}
    cases = [
        ({**files, "model__name": str(config_file("cascade", tmp_path))}, "attentional_pool True"),
        ({**files, "model__name": "clip_tiny"}, "multimodal_cfg is there"),
        ({"model__pretrained": "laion2b_s13b_b90k"}, "no weights for coca_tiny"),
        ({"model__pretrained": str(tmp_path / "absent.pt")}, "no such file"),
        ({"model__name": str(config_file("timm_bn", tmp_path))}, "has BatchNorm"),
        ({"model__lock_image": True, "model__image_unlocked_groups": 9}, "has 6 groups"),
    ]
    recipes = [
        tiny_recipe(run__dir=str(tmp_path / f"run{number}"), data__val=None, **changes)
        for number, (changes, _) in enumerate(cases)
    ]
    for messages in on_ranks(start, 2, recipes):
        for message, (_, expected) in zip(messages, cases, strict=True):
            assert expected in message
            assert "\n" not in message


def test_missing_tokenizers_are_one_line(tmp_path):
    from coca_scale.data.tokens import make_tokenizer
    from coca_scale.model.config import parse_model_config
    from tests.variants import raw_config

    for name in ("nobody/nothing", str(tmp_path)):
        raw = raw_config("coca_tiny", text_cfg__hf_tokenizer_name=name)
        with pytest.raises(UserError, match="give the folder") as caught:
            make_tokenizer(parse_model_config(raw, "x"))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"pads with id 0, text_cfg\.pad_id is 5"):
        make_tokenizer(parse_model_config(raw_config("coca_tiny", text_cfg__pad_id=5), "x"))
    with pytest.raises(UserError, match=r"ends captions with id 2, text_cfg\.eos_id is 4"):
        make_tokenizer(parse_model_config(raw_config("clip_tiny", text_cfg__eos_id=4), "x"))


def test_hugging_face_tokenizer_is_openclips(tmp_path):
    from coca_scale.data.tokens import make_tokenizer

    config = variant("roberta", tmp_path)
    ours = make_tokenizer(config)
    theirs = open_clip.tokenizer.HFTokenizer(config.text_cfg.hf_tokenizer_name, context_length=24)
    captions = ["a red circle", "Größe &amp; ünicode", "small " * 40, ""]
    assert torch.equal(ours(captions), theirs(captions))
    assert (ours.pad_id, ours.start_id, ours.end_id) == (1, 0, 2)
    assert ours.decode(ours("a red circle")[0].tolist()) == "a red circle"
    ours.save(tmp_path)
    again = make_tokenizer(config, tmp_path)
    assert torch.equal(again(captions), ours(captions))


def test_dry_run_needs_neither_tokenizer_nor_network(tmp_path):
    command = [sys.executable, "coca_scale/train.py", "--recipe", "recipes/roberta.yaml"]
    done = subprocess.run(
        [*command, "--dry-run"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "421,029,889 parameters" in done.stdout


def test_the_package_offers_its_interface(weights, tmp_path):
    import coca_scale

    assert all(hasattr(coca_scale, name) for name in coca_scale.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        coca_scale.nothing  # noqa: B018
    assert json.loads(json.dumps(coca_scale.load_model_config("coca_tiny").to_dict()))
    write_folder(weights, load_model_config("coca_tiny"), tmp_path)
    model = coca_scale.load_model(str(tmp_path))
    from PIL import Image

    picture = Image.new("RGB", (90, 60), "red")
    picture.save(tmp_path / "red.png")
    images = torch.stack([model.preprocess(picture)])
    _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    assert torch.allclose(images[0], transform(picture), atol=1e-6)
    assert model.caption([picture, tmp_path / "red.png"])[0] == model.caption([picture])[0]
    assert model.encode_image(images).norm() == pytest.approx(1.0, abs=1e-5)
    assert model.encode_image(images, normalize=False).norm() != pytest.approx(1.0, abs=1e-3)


def test_every_field_of_our_configs_is_openclips_or_dropped():
    """A field that its dataclasses do not know makes open_clip refuse the whole config."""
    from open_clip.coca_model import MultimodalCfg
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    from coca_scale.model.tower_config import (
        MAMMUT_FIELDS,
        MODERN_FIELDS,
        DecoderConfig,
        TextConfig,
        VisionConfig,
    )

    dropped = {"hf_config", "correct_cls_mask"}  # by to_openclip_config
    # an export with one of these is for OpenCLIP 4.2 (`needs_openclip`), whose fields they are
    modern = MODERN_FIELDS | {"variable_text", "bos_id", "text_arch"}
    later = modern | MAMMUT_FIELDS | {"attention_mode", "cross_attn_ratio", "tie_lm_head"}
    for ours, theirs in (
        (VisionConfig, CLIPVisionCfg),
        (TextConfig, CLIPTextCfg),
        (DecoderConfig, MultimodalCfg),
    ):
        known = {field.name for field in dataclasses.fields(theirs)} | dropped | later
        assert set(ours.model_fields) <= known


def epoch_of(state_dict):
    """Beside weights, what trainers keep: of numpy, argparse, pathlib, datetime."""
    rates = [kind(1e-3) for kind in (np.float64, np.float32, np.float16, np.int64)]
    return {
        "epoch": np.int32(7),
        "state_dict": state_dict,
        "optimizer": {"param_groups": [{"lr": rate} for rate in rates]},
        "random": np.random.get_state(),
        "grid": np.arange(6).reshape(2, 3),
        "names": np.array(["a", "b"]),
        "args": argparse.Namespace(logs=Path("/logs"), lr=np.float64(1e-3)),
        "at": datetime.datetime(2024, 1, 1),
    }


def test_training_checkpoints_with_numpys_numbers_are_read_without_numpy(weights, tmp_path):
    theirs = {f"module.{n}": t.clone() for n, t in to_openclip(weights).items()}
    torch.save(epoch_of(theirs), tmp_path / "epoch_7.pt")
    found = find_model(str(tmp_path / "epoch_7.pt"), "coca_tiny")
    assert all(torch.equal(found.weights[n], t) for n, t in weights.items())
    theirs["module.logit_scale"] = np.float64(2.5)
    torch.save(epoch_of(theirs), tmp_path / "odd.pt")
    with pytest.raises(UserError, match="logit_scale' is a Unread, not a tensor"):
        read_weight_file(tmp_path / "odd.pt")
    torch.save({**epoch_of({}), "more": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="could run code"):
        read_weight_file(tmp_path / "evil.pt")
    assert not Path("/tmp/coca_scale_code_ran").exists()


def test_classes_of_endless_names_are_refused_by_their_length(tmp_path):
    """Torch would search its message about a name of a megabyte for hours."""
    short, long = b"cargparse\nNamespace\n", b"cargparse\n" + b"N" * 10**6 + b"\n"
    for as_zip in (True, False):
        file = tmp_path / f"{as_zip}.pt"
        content = {"a": argparse.Namespace()}
        torch.save(content, file, _use_new_zipfile_serialization=as_zip)
        if as_zip:
            with zipfile.ZipFile(file) as plain:
                files = {name: plain.read(name) for name in plain.namelist()}
            with zipfile.ZipFile(file, "w") as changed:
                for name, data in files.items():
                    changed.writestr(name, data.replace(short, long))
        else:
            file.write_bytes(file.read_bytes().replace(short, long))
        with pytest.raises(UserError, match="a class that nobody could name"):
            read_pickle(file, unread=("argparse",))


def test_files_that_unfold_into_more_than_they_are(tmp_path):
    huge = {"a": torch.zeros(1).expand(10**6, 10**6)}
    torch.save(huge, tmp_path / "expanded.pt")
    torch.save({"a": torch.zeros(4, device="meta")}, tmp_path / "meta.pt")
    torch.save({"a": torch.eye(300).to_sparse()}, tmp_path / "sparse.pt")
    torch.save({"a": torch.zeros(2**20), "b": torch.randn(64)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain:
        files = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name, content in files.items():
            bomb.writestr(name, content)
    for name, message in (
        ("expanded.pt", "1000000 × 1000000 without as many numbers"),
        ("meta.pt", "without data"),
        ("sparse.pt", "sparse"),
        ("bomb.pt", "unfold into more than it is"),
    ):
        with pytest.raises(UserError, match=message):
            read_weight_file(tmp_path / name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_become_fp32(weights, tmp_path, dtype):
    theirs = {n: t.to(dtype) for n, t in to_openclip(weights).items()}
    save_file(theirs, tmp_path / "w.safetensors")
    loaded = load_model(str(tmp_path / "w.safetensors"), "coca_tiny")
    assert {p.dtype for p in loaded.model.coca.parameters()} == {torch.float32}
    expected = weights["image.projection"].to(dtype).float()
    assert torch.equal(loaded.weights["image.projection"], expected)
    whole = {n: t.round().long() if n == "visual.proj" else t for n, t in theirs.items()}
    save_file(whole, tmp_path / "whole.safetensors")
    with pytest.raises(UserError, match=r"image\.projection is torch\.int64 in the weights"):
        load_model(str(tmp_path / "whole.safetensors"), "coca_tiny")
