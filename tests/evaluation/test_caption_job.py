"""`coca-scale caption`: every picture once, in order, whatever happens."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from coca_scale.cli import app
from coca_scale.data.sample import DataError
from coca_scale.data.synthetic import Shapes
from coca_scale.errors import UserError
from coca_scale.evaluation.caption_files import CaptionFile, SideCars
from coca_scale.evaluation.captioning import Captioned
from coca_scale.evaluation.pictures import Picture, Place
from coca_scale.model import CoCa, load_model_config
from coca_scale.openclip.state_dict import to_openclip
from tests.data.shards import write_shards
from tests.disks import no_file_over
from tests.invoke import output_of
from tests.json_lines import lines_of
from tests.ports import free_port
from tests.stopping import stopped
from tests.variants import weights_of

QUICK = ("--method", "greedy", "--max-length", "8")
caption = partial(output_of, "caption")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """500 small pictures, two of which are none."""
    out = tmp_path_factory.mktemp("pictures")
    shapes = Shapes(500, 32, "val")
    for number in range(500):
        shapes[number].image.save(out / f"{number:03d}.png")
    (out / "017.png").write_bytes(b"no picture")
    (out / "400.png").write_bytes(b"")
    return out


def test_files_folders_tables_and_shards(trained, folder, tmp_path):
    table = tmp_path / "some.csv"
    table.write_text(f"filepath\n{folder}/003.png\n{folder}/gone.png\n{folder}/004.png\n")
    shard = write_shards(tmp_path, [5])
    out = tmp_path / "new" / "captions.jsonl"
    shown = caption(
        *(trained.folder, folder / "001.png", folder / "002.png", table, shard, "--out", out),
        *(*QUICK, "--picture", tmp_path / "grid.png"),
    )
    found = lines_of(out)
    names = [str(folder / f"00{n}.png") for n in (1, 2, 3, 4)]
    assert [line["key"] for line in found[:4]] == names
    assert len(found) == 9 and all(line["caption"] and line["score"] < 0 for line in found)
    assert "references" in found[-1] and "references" not in found[0]
    assert "9 pictures captioned" in shown and "pictures/s" in shown
    assert "skipped 1 (1 × missing_image)" in shown
    assert Image.open(tmp_path / "grid.png").size[0] > 500
    assert not list(out.parent.glob("*.part*"))


def test_what_cannot_be_written_leaves_nothing_behind(trained, folder, tmp_path):
    weights = weights_of(CoCa(load_model_config("clip_tiny")))
    torch.save(to_openclip(weights), tmp_path / "clip.pt")
    out = tmp_path / "captions.jsonl"
    for model, options, message in (
        (tmp_path / "clip.pt", ("--config", "clip_tiny"), "this model is a CLIP"),
        (trained.folder, ("--max-length", "99"), "99 were asked for"),
        (trained.folder, ("--prompt", "small " * 9, "--max-length", "8"), "leaves no place"),
    ):
        arguments = ["caption", str(model), str(folder), "--out", str(out), *options]
        done = CliRunner().invoke(app, arguments)
        assert isinstance(done.exception, UserError), done.output
        assert message in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.pt"]


def test_a_call_that_could_caption_nothing_fails_and_leaves_nothing(trained, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    (folder / "a.tif").write_bytes(b"no picture")
    (folder / "b.heic").write_bytes(b"ftypheic")
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 500)
    out = tmp_path / "captions.jsonl"
    for name, message in (
        ("scans/a.tif", "no picture can be captioned (found 1 × broken_image)"),
        ("scans", "found 1 × broken_image, 1 × format_heic; pictures in formats"),
        ("scans/b.heic", "neither a shard (.tar) nor a picture"),
        ("broken.tar", "found 1 × broken_shard"),
        ("gone.heic", "no such file or folder"),
    ):
        for target in (out, tmp_path / "folder") if name == "broken.tar" else (out,):
            arguments = ["caption", str(trained.folder), str(tmp_path / name), "--out", str(target)]
            done = CliRunner().invoke(app, arguments)
            assert isinstance(done.exception, UserError), (name, done.output)
            assert message in str(done.exception)
    assert {path.name for path in tmp_path.iterdir()} == {"scans", "broken.tar", "folder"}


def test_a_table_in_another_encoding_and_a_folder_called_as_a_picture(trained, folder, tmp_path):
    pictures = tmp_path / "holiday.jpg"
    pictures.mkdir()
    (pictures / "é.PNG").write_bytes((folder / "001.png").read_bytes())
    table = tmp_path / "T.TSV"
    table.write_bytes(f"filepath\ttitle\n{pictures}/é.PNG\tcafé".encode("cp1252"))
    out = tmp_path / "captions.jsonl"
    caption(trained.folder, table, pictures, "--encoding", "cp1252", "--out", out, *QUICK)
    found = lines_of(out)
    assert [line["key"] for line in found] == 2 * [f"{pictures}/é.PNG"]
    assert found[0]["references"] == ["café"]


def test_captions_do_not_depend_on_batches(trained, folder, tmp_path):
    outs = []
    for size in (3, 50):
        outs.append(tmp_path / f"{size}.jsonl")
        draw = ("--method", "top-p", "--top-p", "0.9", "--samples", "2", "--seed", "7")
        data = (folder / "001.png", folder / "002.png", folder / "003.png", folder / "004.png")
        caption(trained.folder, *data, "--out", outs[-1], *draw, "--batch-size", size)
    texts = [[line["captions"] for line in lines_of(out)] for out in outs]
    assert texts[0] == texts[1]
    assert all(len(pair) == 2 for pair in texts[0])


def test_a_prompt_begins_every_caption(trained, folder, tmp_path):
    out = tmp_path / "p.jsonl"
    caption(trained.folder, folder / "001.png", "--out", out, "--prompt", "the blue")
    assert lines_of(out)[0]["caption"].startswith("the blue")


@pytest.mark.slow
def test_killed_at_random_moments_every_picture_comes_once(trained, folder, tmp_path):
    out = tmp_path / "captions.jsonl"
    command = [sys.executable, "-m", "coca_scale", "caption", str(trained.folder), str(folder)]
    command += ["--out", str(out), *QUICK, "--batch-size", "8"]
    dice, kills = random.Random(0), 0
    for _ in range(40):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        part = tmp_path / "captions.jsonl.part-0-of-1"
        before = part.stat().st_size if part.is_file() else 0
        # most of the time goes into starting; the kill is to come while captions are written
        while process.poll() is None and (not part.is_file() or part.stat().st_size <= before):
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.4))
        if kills < 3 and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
            process.communicate()
            continue
        shown, _ = process.communicate()
        assert process.returncode == 0
        break
    assert kills == 3 and "were there before" in shown
    names = sorted(str(p) for p in folder.glob("*.png") if p.stem not in ("017", "400"))
    assert [line["key"] for line in lines_of(out)] == names
    assert sorted(p.name for p in tmp_path.iterdir()) == ["captions.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lock", "left"),
    [
        ("captions.jsonl", ".captions.jsonl.lock", ["captions.jsonl"]),
        (
            "captions",
            "captions/.lock",
            ["captions", "captions/000.jsonl", "captions/settings.json"],
        ),
    ],
)
def test_of_two_calls_for_one_output_the_second_names_the_first(
    name, lock, left, trained, tmp_path
):
    out = tmp_path / "out" / name
    command = [sys.executable, "-m", "coca_scale", "caption", str(trained.folder)]
    command += [write_shards(tmp_path, [300]), "--out", str(out), *QUICK, "--batch-size", "2"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    owner = tmp_path / "out" / lock / "1.json"
    while not (owner.is_file() and owner.stat().st_size):
        assert first.poll() is None
        time.sleep(0.005)
    with stopped(first, owner):
        second = subprocess.run(command, capture_output=True, text=True)
    first.communicate()
    assert (first.returncode, second.returncode) == (0, 1)
    assert f"{out} is in use by process {first.pid} on" in second.stderr
    assert "Traceback" not in second.stderr and "choose another --out" in second.stderr
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in out.parent.rglob("*"))
    assert found == left
    assert len(lines_of(tmp_path / "out" / left[min(1, len(left) - 1)])) == 300


def test_parts_that_are_gone_are_not_made_an_empty_file(tmp_path):
    out = tmp_path / "captions.jsonl"
    out.write_text("kept")
    file = CaptionFile(out, 0, 1, {})
    file.close()
    file.discard()
    with pytest.raises(DataError, match="its parts have been removed"):
        file.merge()
    assert out.read_text() == "kept"


def start(count, arguments):
    """One process per rank, as torchrun starts them."""
    port = str(free_port())
    for rank in range(count):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1"}
        environment |= {name: str(value) for name, value in variables.items()}
        command = [sys.executable, "-m", "coca_scale", "caption", *map(str, arguments)]
        yield subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def ranks(count, arguments):
    """What each rank said."""
    started = list(start(count, arguments))
    found = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * count
    return found


@pytest.mark.slow
def test_two_ranks_go_on_with_what_three_have_left(trained, folder, tmp_path):
    out, whole = tmp_path / "captions.jsonl", tmp_path / "whole.jsonl"
    pictures = sorted(folder.glob("*.png"))[:300]
    caption(trained.folder, *pictures, "--out", whole, *QUICK)
    arguments = (trained.folder, *pictures, "--out", out, *QUICK, "--batch-size", "2")
    first = list(start(3, arguments))
    parts = [tmp_path / f"captions.jsonl.part-{rank}-of-3" for rank in range(3)]
    while not all(part.is_file() and part.read_text().count("\n") > 5 for part in parts):
        assert all(process.poll() is None for process in first)
        time.sleep(0.01)
    for process in first:
        process.kill()
        process.communicate()
    assert not out.exists()
    with parts[1].open("a") as part:
        part.write('{"part": 0, "num')  # a line that was being written
    shown = ranks(2, arguments)
    assert "were there before" in shown[0] and "skipped 1" in shown[0]
    assert not shown[1]
    keys = [[(line["key"], line["caption"]) for line in lines_of(file)] for file in (out, whole)]
    assert keys[0] == keys[1]


@pytest.mark.slow
def test_shards_get_side_cars(trained, tmp_path):
    write_shards(tmp_path, [6, 9, 4])
    out = tmp_path / "captions"
    arguments = (trained.folder, tmp_path, "--out", out, *QUICK)
    shown = ranks(2, arguments)
    assert "19 pictures captioned" in shown[0]
    found = {p.stem: lines_of(p) for p in out.glob("*.jsonl")}
    assert sorted(map(len, found.values())) == [4, 6, 9]
    victim = next(out.glob("*.jsonl"))
    kept = victim.read_text()
    victim.unlink()
    assert f"{len(kept.splitlines())} pictures captioned" in caption(*arguments)
    assert victim.read_text() == kept
    done = CliRunner().invoke(app, ["caption", *map(str, arguments), "--seed", "3"])
    assert "holds captions of another model or other options" in str(done.exception)


def test_other_options_do_not_mix(trained, folder, tmp_path):
    out = tmp_path / "captions.jsonl"
    part = tmp_path / "captions.jsonl.part-0-of-1"
    part.write_text('{"settings": {"model": "other"}}\n')
    arguments = [str(trained.folder), str(folder / "001.png"), "--out", str(out)]
    done = CliRunner().invoke(app, ["caption", *arguments])
    assert "was begun with another model" in str(done.exception)
    done = CliRunner().invoke(app, ["caption", *arguments[:2], "--out", str(tmp_path / "folder")])
    assert "side-cars are of shards" in str(done.exception)


@pytest.mark.parametrize("line", ['{"key": "x"}', '{"part": 0, "number": "x"}', "[1]", "\0", "{"])
def test_a_damaged_line_is_named_and_a_last_one_cut_off_is_dropped(tmp_path, line):
    part = tmp_path / "captions.jsonl.part-0-of-1"
    whole = '{"part": 0, "number": 3, "key": "k", "caption": "é", "score": -1.5, "captions": ["é"]}'
    head = '{"settings": {"model": "m"}}'
    part.write_text(f"{head}\n{line}\n{whole}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"part-0-of-1: line 2: .*captioned again") as caught:
        CaptionFile(tmp_path / "captions.jsonl", 0, 1, {"model": "m"})
    assert "\n" not in str(caught.value)
    part.write_text(f"{head}\n{whole}\n{line}", encoding="utf-8")
    file = CaptionFile(tmp_path / "captions.jsonl", 0, 1, {"model": "m"})
    assert file.done == {(0, 3)}
    file.close()
    file.merge()
    (found,) = lines_of(tmp_path / "captions.jsonl")
    assert found == {"key": "k", "caption": "é", "score": -1.5, "captions": ["é"]}


@pytest.mark.parametrize("content", [b"\xff\xfe\0", b"", b"{", b"[" * 100_000, b"[1]"])
def test_damaged_settings_are_named(tmp_path, content):
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(UserError, match=r"settings\.json") as caught:
        SideCars(tmp_path, []).settle({"model": "m"})
    assert "\n" not in str(caught.value)


def test_names_of_files_need_not_be_text(tmp_path):
    name = os.fsdecode(b"\xff/\xc3\xa9.png")
    picture = Picture(Place(0, 3), name, torch.zeros(3, 2, 2, dtype=torch.uint8), ())
    file = CaptionFile(tmp_path / "captions.jsonl", 0, 1, {})
    file.add([Captioned(picture, ("é",), (-1.5,))])
    file.close()
    file = CaptionFile(tmp_path / "captions.jsonl", 0, 1, {})
    assert file.done == {(0, 3)}
    file.close()
    file.merge()
    assert lines_of(tmp_path / "captions.jsonl")[0]["key"] == name


def test_a_full_disk_is_named_and_with_room_a_job_goes_on(tmp_path):
    out = tmp_path / "c.jsonl"
    picture = Picture(Place(0, 0), "key", torch.zeros(3, 4, 4, dtype=torch.uint8), ())
    for room in (0, 10, 30):
        with no_file_over(room), pytest.raises(OSError, match="File too large") as error:
            file = CaptionFile(out, 0, 1, {"seed": 1})
            file.add([Captioned(picture, ("a red circle",), (0.5,))])
        assert error.value.filename == f"{out}.part-0-of-1"
    file = CaptionFile(out, 0, 1, {"seed": 1})
    file.add([Captioned(picture, ("a red circle",), (0.5,))])
    file.close()
    with no_file_over(30), pytest.raises(OSError, match="File too large") as error:
        file.merge()
    assert error.value.filename == str(out) and not out.exists()
    file.merge()
    assert [line["caption"] for line in lines_of(out)] == ["a red circle"]
    assert list(tmp_path.iterdir()) == [out]
