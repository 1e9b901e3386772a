"""Runs with a teacher: they resume as the same run, and students come to see as it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from webdataset import TarWriter

from coca_scale.data.images import decode_image, eval_pixels
from coca_scale.data.synthetic import Shapes
from coca_scale.errors import UserError
from coca_scale.inference.load import load_model
from coca_scale.model import CoCa
from coca_scale.model.config import parse_model_config
from coca_scale.openclip.folder import write_folder
from tests.conftest import tiny_recipe
from tests.invoke import output_of
from tests.json_lines import curve, lines_of
from tests.ranks import on_ranks, train_all
from tests.variants import raw_config, weights_of


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Drawings in four shards."""
    folder, shapes = tmp_path_factory.mktemp("shards"), Shapes(128, 48, "train")
    for number in range(4):
        with TarWriter(str(folder / f"{number:03d}.tar")) as writer:
            for i in range(number, 128, 4):
                sample = shapes[i]
                names = {"__key__": f"{i:03d}", "png": sample.image, "txt": sample.caption}
                writer.write(names)
    return folder


@pytest.fixture(scope="module")
def stored(shards, trained, tmp_path_factory):
    """What the captioner makes of them."""
    folder = tmp_path_factory.mktemp("features")
    output_of("data", "embed", trained.folder, shards, "--out", folder)
    return folder


def other_teacher(folder):
    """A CLIP with larger pictures, longer captions and narrower features."""
    torch.manual_seed(3)
    longer = {"text_cfg__context_length": 24, "vision_cfg__image_size": 64, "embed_dim": 64}
    config = parse_model_config(raw_config("clip_tiny", **longer), "teacher")
    write_folder(weights_of(CoCa(config)), config, folder)
    return str(folder)


def taught(folder, shards, distill, *stages, **changes):
    return tiny_recipe(
        **{
            "run__dir": str(folder),
            "data__train": str(shards),
            "schedule__name": "constant",
            "schedule__stages": list(stages),
            "train__steps": None if stages else 6,
            "train__micro_batch": 4,
            "loss__distill": distill,
            **changes,
        }
    )


def weights(folder):
    from coca_scale.engine.checkpoint import find_checkpoint, read_weights

    return read_weights(find_checkpoint(Path(folder) / "checkpoints"))


@pytest.mark.slow
def test_stopped_and_resumed_it_is_the_same_run(tmp_path, trained, shards, stored):
    teacher = other_teacher(tmp_path / "teacher")
    running = {"teacher": teacher, "weight": 0.5, "placement": "sharded"}
    small, last = {"steps": 3, "image_size": 24}, {"steps": 3, "context_length": 12}
    staged = {"engine__kept_graphs": 1}
    clip = {"model__name": "clip_tiny", "engine__zero_stage": 2}
    kinds = {
        "stages": (running, (small, last), (small, {**last, "steps": 2}), staged),
        "stored": ({"teacher": str(stored), "feature_weight": 0.5}, (), (), clip),
    }
    jobs = []
    for name, (distill, whole, cut, changes) in kinds.items():
        parts = {"whole": [whole] * max(1, len(whole)), "cut": [*[cut] * max(1, len(cut)), whole]}
        for part, runs in parts.items():
            for number, stages in enumerate(runs):
                steps = {} if stages else {"train__steps": 3 if len(runs) > 1 + number else 6}
                about = (tmp_path / name / part, shards, distill, *stages)
                jobs.append(taught(*about, **changes, **steps))
    on_ranks(train_all, 2, jobs)
    for name in kinds:
        folders = [tmp_path / name / part for part in ("whole", "cut")]
        assert curve(folders[0], 6) == curve(folders[1], 6), name
        expected = weights(folders[0])
        assert all(value.equal(expected[key]) for key, value in weights(folders[1]).items()), name
        lines = lines_of(folders[0] / "metrics.jsonl")
        assert all(line["distill_loss"] > 0 for line in lines)
        assert (lines[0]["distill_features_loss"] > 0) == (name == "stored")
        assert not any("teacher" in key for key in expected)


def refusals_on_rank(rank, ranks, recipes):
    from coca_scale.engine.launch import start_world
    from coca_scale.training.setup import set_up

    world, told = start_world(), []
    for recipe in recipes:
        try:
            set_up(recipe, world)
            told.append(None)
        except UserError as error:
            told.append(str(error))
    return told


@pytest.mark.slow
def test_another_teacher_is_another_run(tmp_path, trained, shards, stored):
    own, run = {"teacher": str(trained.folder)}, tmp_path / "run"
    other = {"teacher": other_teacher(tmp_path / "teacher")}
    on_ranks(train_all, 1, [taught(run, shards, own, train__steps=1)])
    moved = tmp_path / "moved"
    moved.symlink_to(trained.folder)
    tries = {
        "loss.distill: another teacher": other,
        "loss.distill: another teach": {"teacher": str(stored)},
        "loss.distill: one → none": {},
        "loss.distill.weight 1.0 → 2.0": {**own, "weight": 2.0},
        "the teacher's features have 64 elements, this model's 128": {**other, "feature_weight": 1},
        "no such folder or file": {"teacher": str(tmp_path / "gone")},
        "or a folder of features (coca-scale data embed)": {"teacher": str(tmp_path)},
    }
    recipes = [
        taught(run, shards, distill) for distill in (*tries.values(), {"teacher": str(moved)})
    ]
    on_synthetic = taught(tmp_path / "new", "synthetic://shapes?count=64", {"teacher": str(stored)})
    (found,) = on_ranks(refusals_on_rank, 1, [*recipes, on_synthetic])
    for message, told in zip(tries, found, strict=False):
        assert message in told
    assert found[-2] is None, "the same teacher in another place"
    assert "has features of shards, and this data is none" in found[-1]


def cosines(folder, teacher):
    """Of the features of drawings that nobody trained on, to those of the teacher."""
    student, shapes = load_model(str(folder)), Shapes(64, 48, "val")
    samples = [shapes[i] for i in range(64)]
    pixels = torch.stack([eval_pixels(decode_image(s.image, s.key), 48) for s in samples])
    tokens = teacher.tokenizer([sample.caption for sample in samples])
    features = [
        torch.stack([m.encode_image(m.normalize(pixels)), m.encode_text(tokens)])
        for m in (student, teacher)
    ]
    return F.cosine_similarity(*features, dim=2).mean(1)


@pytest.mark.slow
def test_a_students_features_come_to_be_the_teachers(tmp_path, trained):
    """A CLIP that learns from a CoCa."""
    sizes = {"train__global_batch": 32, "train__micro_batch": 32, "train__steps": 60}
    learns = {"teacher": str(trained.folder), "feature_weight": 4.0}
    about = {"model__name": "clip_tiny", "run__seed": 5, "optim__lr": 2e-3, **sizes}
    recipe = taught(tmp_path / "run", "synthetic://shapes?count=2048&size=48", learns, **about)
    on_ranks(train_all, 1, [recipe])
    found = cosines(tmp_path / "run" / "export", load_model(str(trained.folder)))
    first, *_, last = lines_of(tmp_path / "run" / "metrics.jsonl")
    print(f"cosine to the teacher's features: {found}")
    assert first["distill_features_loss"] > 0.9, "at first it is of another mind"
    assert last["distill_features_loss"] < 0.2 and (found > 0.8).all()
