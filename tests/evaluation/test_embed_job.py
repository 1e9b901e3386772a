"""`coca-scale data embed`: features of every sample of shards once, whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from webdataset import TarWriter

from coca_scale.data.images import decode_image, eval_pixels
from coca_scale.data.sample import BadSample, RawSample
from coca_scale.data.sources import open_source
from coca_scale.data.stored_features import MANIFEST, StoredFeatures, are_stored
from coca_scale.data.synthetic import Shapes
from coca_scale.errors import UserError
from coca_scale.inference.load import load_model
from coca_scale.recipe.data import DataSection
from tests.data.shards import write_shards
from tests.invoke import mistake_in, output_of
from tests.ranks import on_ranks, quiet

embed = partial(output_of, "data", "embed")
mistake = partial(mistake_in, "data", "embed")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three shards of drawings with a second caption, the first with a broken picture."""
    folder, shapes = tmp_path_factory.mktemp("shards"), Shapes(24, 48, "val")
    for number in range(3):
        with TarWriter(str(folder / f"{number:03d}.tar")) as writer:
            for i in range(number, 24, 3):
                sample = shapes[i]
                picture = b"no picture" if i == 0 else sample.image
                more = {"captions": [sample.caption, f"this is {sample.caption}"], "alt": "drawn"}
                names = {"__key__": f"{i:02d}", "jpg": picture, "txt": sample.caption}
                writer.write({**names, "json": more})
    return folder


def source_of(folder, **captions):
    return open_source(str(folder), DataSection(train=[str(folder)], captions=captions), 0)


def pairs(stored, folder, **captions):
    """Features of all samples with all their captions."""
    samples = [s for s in source_of(folder, **captions).ordered(0, 1) if isinstance(s, RawSample)]
    return {(s.key, caption): stored(s, caption) for s in samples[1:] for caption, _ in s.captions}


def test_they_are_what_the_model_makes_of_pictures_and_captions(trained, shards, tmp_path):
    out = tmp_path / "features"
    told = embed(trained.folder, shards, "--out", out, "--batch-size", 5)
    assert "23 pictures with 46 captions embedded in" in told.replace("\n", " ")
    assert "pictures/s" in told and "skipped 1 (1 × broken_image)" in told.replace("\n", " ")
    stored, loaded = StoredFeatures(out), load_model(str(trained.folder))
    stored.check(source_of(shards))
    assert stored.facts.log_scale == pytest.approx(2.6)
    samples = list(source_of(shards, captions=1.0).ordered(0, 1))
    for sample in samples[1:]:
        pixels = eval_pixels(decode_image(sample.image, sample.key), 48)
        image = loaded.encode_image(loaded.normalize(pixels[None]))[0]
        for caption, _ in sample.captions:
            text = loaded.encode_text(loaded.tokenizer([caption]))[0]
            found = stored(sample, caption)
            assert found.dtype == torch.float16
            assert torch.allclose(found.float(), torch.stack([image, text]), atol=1e-3)
    with pytest.raises(BadSample, match="missing_features"):
        stored(samples[1], "a caption that it does not have")
    with pytest.raises(BadSample, match="missing_features"):
        stored(samples[0], samples[0].caption)


def on_two(rank, ranks, folder, shards, out):
    with quiet():
        return embed(folder, shards, "--out", out, "--captions", "txt", "--captions", "alt")


def test_two_ranks_do_what_is_missing(trained, shards, tmp_path):
    out = tmp_path / "features"
    names = ("--captions", "alt", "--captions", "txt")
    embed(trained.folder, shards / "001.tar", "--out", out, *names)
    before = (out / "001.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match=r"no features of 2 of 3 shards, first: .*000\.tar"):
        StoredFeatures(out).check(source_of(shards))
    told, nothing = on_ranks(on_two, 2, trained.folder, shards, out)
    assert "15 pictures" in told and "8 were there before" in told and not nothing
    assert (out / "001.safetensors").stat().st_mtime_ns == before
    assert sorted(p.name for p in out.iterdir()) == [
        *("000.safetensors", "001.safetensors", "002.safetensors", MANIFEST)
    ]
    whole = tmp_path / "whole"
    embed(trained.folder, shards, "--out", whole, *names)
    both = [pairs(StoredFeatures(at), shards, txt=1.0, alt=1.0) for at in (out, whole)]
    assert len(both[0]) == 2 * 23
    for pair, found in both[0].items():
        assert torch.allclose(found, both[1][pair], atol=1e-3), pair


def test_a_folder_is_of_one_teacher_and_a_shard_known_by_its_name(trained, shards, tmp_path):
    out, other = tmp_path / "features", tmp_path / "other"
    embed(trained.folder, shards / "001.tar", "--out", out)
    assert "another model, precision or captions" in mistake(
        trained.folder, shards, "--out", out, "--precision", "bf16"
    )
    other.mkdir()
    write_shards(other, [2])
    assert "000.safetensors: a shard is known by its name" in mistake(
        trained.folder, shards, other, "--out", out
    )
    assert "features are of shards" in mistake(
        trained.folder, "synthetic://shapes?count=9", "--out", out
    )
    assert not list(out.glob("000*"))


def test_a_shard_that_could_not_be_read_is_tried_again(trained, shards, tmp_path):
    later = f"pipe:cat {tmp_path}/later.tar"
    told = embed(trained.folder, shards / "001.tar", later, "--out", tmp_path)
    assert "8 pictures" in told and "unreadable_shard" in told
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["001.safetensors"]


def test_what_is_damaged_is_told(tmp_path, shards, trained):
    assert not are_stored(str(tmp_path))
    embed(trained.folder, shards / "001.tar", "--out", tmp_path)
    assert are_stored(str(tmp_path))
    (sample, *_) = source_of(shards / "001.tar").ordered(0, 1)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "embed_dim": 3}))
    with pytest.raises(UserError, match=r"not those that teacher\.json tells of"):
        StoredFeatures(tmp_path)(sample, sample.caption)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    (tmp_path / "001.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="not readable as stored features"):
        StoredFeatures(tmp_path)(sample, sample.caption)


@pytest.mark.slow
def test_killed_it_leaves_whole_files_and_goes_on(trained, tmp_path):
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", [40] * 8)
    out = tmp_path / "features"
    command = [sys.executable, "-m", "coca_scale", "data", "embed", str(trained.folder)]
    command += [str(tmp_path / "shards"), "--out", str(out), "--batch-size", "4"]
    process = subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    while len(list(out.glob("*.safetensors"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {path.name for path in out.glob("*.safetensors")}
    assert len(there) < 8
    assert all(len(load_file(out / name)["captions"]) == 40 for name in there)
    told = embed(trained.folder, tmp_path / "shards", "--out", out).replace("\n", " ")
    assert f"{40 * len(there)} were there before" in told
    StoredFeatures(out).check(source_of(tmp_path / "shards"))
    found = [len(load_file(path)["captions"]) for path in out.glob("*.safetensors")]
    assert found == [40] * 8
