"""Packing and inspecting as users do it: interrupted, damaged, with many captions."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner
from webdataset import TarWriter

from coca_scale.cli import app
from coca_scale.data.inspection import inspect_shards
from coca_scale.data.pack import PackOptions, pack, pack_split
from coca_scale.data.sample import DataError
from coca_scale.data.sources import open_source
from coca_scale.recipe.files import sha256_of
from tests.conftest import tiny_recipe
from tests.data.rot import rot_shards, write_rotten_shards
from tests.data.shards import encoded, write_shards
from tests.disks import no_file_over
from tests.invoke import mistake_in, output_of
from tests.stopping import stopped

DATA = tiny_recipe().data


def write_pictures(folder, count, size=(300, 200)):
    folder.mkdir()
    for number in range(count):
        image = Image.effect_noise(size, 60).convert("RGB")
        image.save(folder / f"{number:03d}.jpg", quality=95)
        (folder / f"{number:03d}.txt").write_text(f"picture number {number}")
    return folder


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".tar", ".json")}


def test_pack_is_the_same_with_any_number_of_processes_and_shards_are_even(tmp_path):
    pictures = write_pictures(tmp_path / "pictures", 31, (30, 20))
    for workers in (1, 3):
        pack(pictures, tmp_path / f"out{workers}", PackOptions(shard_samples=7), workers)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3")
    manifest = json.loads((tmp_path / "out1" / "manifest.json").read_text())
    assert [shard["samples"] for shard in manifest["shards"]] == [6, 6, 6, 6, 7]
    for shard in manifest["shards"]:
        assert sha256_of(tmp_path / "out1" / shard["name"]) == shard["sha256"]
    assert sorted(p.name for p in (tmp_path / "out1").iterdir()) == [
        "manifest.json",
        *(f"shard-{number:06d}.tar" for number in range(5)),
    ]


def test_a_killed_pack_goes_on_and_gives_the_same_shards(tmp_path):
    pictures = write_pictures(tmp_path / "pictures", 60)
    options = ["--shard-samples", "6", "--max-side", "64", "--workers", "1"]
    command = [sys.executable, "-c", "from coca_scale.cli import main; main()"]
    arguments = ["data", "pack", str(pictures), "--out", str(tmp_path / "out"), *options]
    process = subprocess.Popen([*command, *arguments], start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "out").glob("*.tar"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "manifest.json").exists()
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("shard-*.json")}
    with pytest.raises(DataError, match="part of a pack of other pictures or options"):
        pack(pictures, tmp_path / "out", PackOptions(shard_samples=6))
    kept = {p.with_suffix(".tar"): p.with_suffix(".tar").stat().st_mtime_ns for p in done}
    assert "60 samples in 10 shards" in output_of(*arguments)
    assert kept == {p: p.stat().st_mtime_ns for p in kept}  # not written again
    pack(pictures, tmp_path / "whole", PackOptions(shard_samples=6, max_side=64))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


class SlowPack:
    """A pack of 200 shards by two processes, in a session of its own, after its first shard."""

    def __init__(self, tmp_path):
        pictures = write_pictures(tmp_path / "pictures", 1, (3000, 2000))
        for number in range(1, 200):
            for kind in ("jpg", "txt"):
                os.link(pictures / f"000.{kind}", pictures / f"{number:03d}.{kind}")
        self.out = tmp_path / "out"
        options = ["--shard-samples", "1", "--max-side", "64", "--workers", "2"]
        options += ["--out", self.out]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "coca_scale", "data", "pack", pictures, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        while not self.shards:
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.01)

    @property
    def shards(self):
        return len(list(self.out.glob("*.tar")))

    def workers(self):
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for file in children for pid in file.read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "whole_group", "code"),
    [
        (signal.SIGINT, True, 130),
        (signal.SIGINT, False, 130),
        (signal.SIGTERM, False, -signal.SIGTERM),
        (signal.SIGKILL, False, -signal.SIGKILL),
    ],
)
def test_processes_of_a_pack_end_with_it(number, whole_group, code, tmp_path):
    pack = SlowPack(tmp_path)
    (os.killpg if whole_group else os.kill)(pack.process.pid, number)
    said = pack.process.communicate(timeout=60)  # its output ends when its processes have
    assert pack.process.returncode == code
    assert "".join(said).strip() == ""
    assert 0 < pack.shards < 200


@pytest.mark.slow
def test_a_process_of_a_pack_that_is_killed_is_told_in_a_line(tmp_path):
    pack = SlowPack(tmp_path)
    os.kill(pack.workers()[0], signal.SIGKILL)
    out, errors = pack.process.communicate(timeout=60)
    assert (pack.process.returncode, out) == (1, "")
    assert errors.startswith("coca-scale: a process was killed, as the kernel does")
    assert len(errors.splitlines()) == 1


def test_a_full_disk_ends_a_pack_and_with_room_it_goes_on(tmp_path):
    pictures = write_pictures(tmp_path / "pictures", 24)
    for number in range(12):  # small ones, whose shards have room
        Image.new("RGB", (30, 20)).save(pictures / f"{number:03d}.jpg")
    packing = (pictures, tmp_path / "out", PackOptions(shard_samples=6))
    with no_file_over(100_000), pytest.raises(OSError, match="File too large") as error:
        pack(*packing, workers=2)
    assert re.search(r"out/shard-00000[23].tar$", error.value.filename)
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"pack.json", "shard-000000.tar"}
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert pack(*packing).samples == 24
    assert len(list((tmp_path / "out").iterdir())) == 5


def test_of_two_packs_into_one_folder_the_second_names_the_first(tmp_path):
    pictures = write_pictures(tmp_path / "pictures", 60)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "coca_scale", "data", "pack", str(pictures), "--out", str(out)]
    command += ["--shard-samples", "6", "--max-side", "64", "--workers", "1"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    while not list(out.glob("*.tar")):
        assert first.poll() is None
        time.sleep(0.005)
    with stopped(first, out / ".lock" / "1.json"):
        second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 1
    assert f"{out} is in use by process {first.pid} on" in second.stderr
    assert "Traceback" not in second.stderr and "choose another --out" in second.stderr
    first.communicate()
    assert first.returncode == 0
    assert len(list(out.glob("*.tar"))) == 10
    assert sorted(p.name for p in out.iterdir() if p.suffix != ".tar") == ["manifest.json"]


def test_every_nth_picture_is_held_out_once(tmp_path):
    pictures = write_pictures(tmp_path / "pictures", 11, (30, 20))
    output_of("data", "pack", pictures, "--out", tmp_path / "out", "--hold-out", "4")
    found = {
        part: [s.caption for s in open_source(str(tmp_path / "out" / part), DATA, 0).ordered(0, 1)]
        for part in ("train", "val")
    }
    assert found["val"] == [f"picture number {n}" for n in (0, 4, 8)]
    assert sorted(found["train"] + found["val"]) == sorted(f"picture number {n}" for n in range(11))
    (tmp_path / "out" / "train" / "manifest.json").unlink()  # as if it had been killed there
    again = pack_split(pictures, tmp_path / "out", PackOptions(), 4)
    assert (again["train"].samples, again["val"].samples) == (8, 3)
    with pytest.raises(DataError, match="holds packed shards already"):
        pack_split(pictures, tmp_path / "out", PackOptions(), 4)


@pytest.mark.parametrize("content", [b'{"samples": []}', b"[1]", b"\xff\xfe\0", b'{"shards": 5}'])
def test_a_damaged_manifest_or_receipt_is_named_and_packed_again(tmp_path, content):
    pictures = write_pictures(tmp_path / "pictures", 5, (30, 20))
    manifest = tmp_path / "out" / "val" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_bytes(content)
    arguments = ("data", "pack", pictures, "--out", tmp_path / "out", "--hold-out", "2")
    said = mistake_in(*arguments)
    assert said.startswith(f"{manifest}: ") and "packed again" in said and "\n" not in said
    manifest.unlink()
    receipt = manifest.parent / "shard-000000.json"
    receipt.write_bytes(content)
    said = mistake_in(*arguments)
    assert said.startswith(f"{receipt}: ") and "packed again" in said and "\n" not in said
    receipt.unlink()
    output_of(*arguments)
    assert json.loads(manifest.read_text())["samples"] == 3


def test_captions_of_one_picture_stay_together(tmp_path):
    pictures = write_pictures(tmp_path / "pictures", 2, (30, 20))
    coco = {
        "images": [{"id": 7, "file_name": "000.jpg"}, {"id": 9, "file_name": "001.jpg"}],
        "annotations": [
            {"image_id": 7, "caption": "a dog"},
            {"image_id": 9, "caption": "a cat "},
            {"image_id": 7, "caption": "a brown dog"},
            {"image_id": 7, "caption": " a dog"},
        ],
    }
    (tmp_path / "captions.json").write_text(json.dumps(coco))
    pack(tmp_path / "captions.json", tmp_path / "out", PackOptions(images=pictures))
    data = tiny_recipe(data__captions={"captions": 1.0}).data
    found = list(open_source(str(tmp_path / "out"), data, 0).ordered(0, 1))
    assert [[text for text, _ in sample.captions] for sample in found] == [
        ["a dog", "a brown dog"],
        ["a cat"],
    ]


def test_img2dataset_folders_are_understood_as_they_are(tmp_path):
    """A folder of shards with the side-cars that img2dataset writes beside them."""
    write_shards(tmp_path, [3, 4])
    for number in range(2):
        (tmp_path / f"{number:03d}.tar").rename(tmp_path / f"{number:05d}.tar")
        (tmp_path / f"{number:05d}_stats.json").write_text(json.dumps({"successes": 3 + number}))
        (tmp_path / f"{number:05d}.parquet").write_bytes(b"PAR1")
    source = open_source(str(tmp_path), tiny_recipe().data, 0)
    assert len(list(source.ordered(0, 1))) == 7
    assert source.count() is None
    output_of("data", "inspect", tmp_path, "--write-manifest")
    assert open_source(str(tmp_path), tiny_recipe().data, 0).count() == 7


def test_inspect_counts_what_is_there(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    planted = write_rotten_shards(folder)
    lost = rot_shards(folder, planted)
    arguments = ["data", "inspect", str(folder), "--workers", "2"]
    outputs = ["--picture", str(tmp_path / "p.png"), "--out", str(tmp_path / "facts.json")]
    output = output_of(*arguments, *outputs)
    facts = json.loads((tmp_path / "facts.json").read_text())
    expected = {cause: len(where) for cause, where in planted.items()}
    assert facts["bad"] == {**expected, **dict.fromkeys(lost, 2)}
    assert facts["shards"] == 40
    assert facts["usable"] == 2400 - sum(lost.values()) - sum(expected.values()) + len(
        planted["duplicate_key"]
    )
    assert facts["samples"] == 2400 - sum(lost.values())
    assert f"{len(planted['missing_caption'])}  missing_caption" in output
    assert (tmp_path / "p.png").stat().st_size > 5000
    quick = inspect_shards([str(folder)], decode=False)
    assert {"broken_image", "huge_image", "tiny_image"}.isdisjoint(quick.causes)


def test_check_lists_every_fault_at_once(tmp_path):
    write_shards(tmp_path, [30, 30, 30])
    (tmp_path / "001.tar").unlink()
    (tmp_path / "t.csv").write_text("image,text\na.jpg,word\n")
    wrong = [
        f"data.train={tmp_path}/{{000..002}}.tar",
        f"data.val={tmp_path / 't.csv'}",
        f"run.dir={tmp_path / 't.csv' / 'run'}",
        "train.global_batch=30",
    ]
    result = CliRunner().invoke(
        app,
        ["check", "recipes/tiny.yaml", *wrong, "--gpus", "4", "--device-gigabytes", "0.1"],
    )
    assert result.exit_code == 1
    faults = [line for line in result.output.splitlines() if line.startswith("fault")]
    assert len(faults) == 4, result.output
    for fault, words in zip(
        faults,
        (
            "does not divide over 4 ranks",
            "1 of 3 shards are missing",
            "no column 'filepath'",
            "t.csv cannot be written to",
        ),
        strict=True,
    ):
        assert words in fault
    assert "decoded" in result.output  # what is there was looked at


def test_lengths_are_of_the_captions_that_are_named(tmp_path):
    with TarWriter(str(tmp_path / "0.tar")) as writer:
        fields = {"long": "one two three. four five."}
        writer.write({"__key__": "k", "jpg": encoded(), "txt": "one", "json": fields})
    for names, lengths in (((), [3]), (("long",), [9]), (("txt", "long:sentences"), [3, 6, 5])):
        found = inspect_shards([str(tmp_path)], captions=names)
        assert sorted(found.lengths.elements()) == sorted(lengths), names
    output = output_of("data", "inspect", tmp_path, "--captions", "long", "--captions", "txt")
    assert "2, 2 a picture" in output


def test_captions_longer_than_the_context_are_told(trained, tmp_path):
    """By check for the recipe's model, by inspect for CLIP, by eval for the model at hand."""
    with TarWriter(str(tmp_path / "0.tar")) as writer:
        for number in range(8):
            text = "\n".join([f"a word {number} " * (1 + 5 * (number % 4)), "short"])
            writer.write({"__key__": f"{number}", "jpg": encoded(), "txt": text})
    changes = (f"data.train={tmp_path}", "data.val=null", "model.context_length=16")
    output = output_of("check", "recipes/tiny.yaml", *changes, "--gpus", "1")
    assert "6 of the first 16 captions have more tokens than the context of 16" in output
    assert "longer than" not in output_of("data", "inspect", tmp_path)
    changes = (f"data.train={tmp_path}", "data.val=null", "model.context_length=80")
    assert "more tokens" not in output_of("check", "recipes/tiny.yaml", *changes, "--gpus", "1")
    output_of("eval", "retrieval", trained.folder, tmp_path, "--out", tmp_path / "o.json")
    assert json.loads((tmp_path / "o.json").read_text())["captions_cut"] == 6
    with TarWriter(str(tmp_path / "1.tar")) as writer:
        writer.write({"__key__": "long", "jpg": encoded(), "txt": "word " * 80})
    found = output_of("data", "inspect", tmp_path, "--out", tmp_path / "facts.json")
    assert "captions longer than CLIP's context of 77 tokens: 1;" in found
    assert json.loads((tmp_path / "facts.json").read_text())["captions_cut"] == 1


def test_check_of_a_good_recipe(tmp_path):
    train = write_shards(tmp_path, [40, 40, 40])
    changes = (f"data.train={train}", "data.val=null")
    output = output_of("check", "recipes/tiny.yaml", *changes, "--gpus", "2")
    assert "fault" not in output
    assert "decoded 64 of the first 64 samples" in output
    assert "3 shards for 64 lanes" in output
    larger = ("recipes/small.yaml", f"data.train={train}", "train.global_batch=512")
    result = CliRunner().invoke(app, ["check", *larger, "--device-gigabytes", "1"])
    assert result.exit_code == 1
    assert "GB of 1.0 GB of a GPU per rank; use" in result.output
