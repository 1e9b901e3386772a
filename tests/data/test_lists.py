"""Folders of pictures, files that are none, and what names say."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter

import pytest
from PIL import Image, features

from coca_scale.data.listing import ListOptions, list_pictures
from coca_scale.data.sample import BadSample, DataError
from coca_scale.data.sources import open_source
from coca_scale.errors import UserError
from tests.conftest import tiny_recipe
from tests.data.lists import FORMATS, captioned_pictures, failure_of, packed, written
from tests.data.shards import encoded, write_shards


def test_every_format_that_is_opened_is_taken_and_the_rest_counted_by_name(tmp_path):
    folder = captioned_pictures(tmp_path / "photos", FORMATS)
    for name in (
        "x.heic",
        "y.HEIC",
        "scan.psd",
        "clip.mp4",
        "no_suffix",
        "meta.parquet",
        ".hidden",
    ):
        (folder / name).write_bytes(b"something else")
    (folder / "sub.jpg").mkdir()  # a folder, whatever it is called
    (folder / "sub.jpg" / "j.jpeg").write_bytes(encoded())
    (folder / "sub.jpg" / "j.TXT").write_text("in capitals")
    (folder / "link").symlink_to(tmp_path, target_is_directory=True)
    said, bad = packed(tmp_path, folder)
    assert bad == {
        "format_heic": 2,
        "format_psd": 1,
        "format_mp4": 1,
        "format_unknown": 1,
        "linked_folder": 1,
    }
    assert f"{len(FORMATS) + 1} samples" in said and "converted" in said
    listing = list_pictures(folder, ListOptions())
    found = {picture.path.name: picture.captions for picture in listing.pictures}
    assert found == {name: (f"caption of {name}",) for name in FORMATS} | {
        "j.jpeg": ("in capitals",)
    }


def test_modern_formats_are_opened_where_pillow_can(tmp_path):
    for feature, form, name in (("avif", "AVIF", "a.avif"), ("jpg_2000", "JPEG2000", "b.jp2")):
        if features.check(feature):
            folder = tmp_path / form
            folder.mkdir()
            Image.new("RGB", (32, 32), "red").save(folder / name, form)
            (folder / name).with_suffix(".txt").write_text("red")
            assert "1 samples" in packed(tmp_path, folder)[0]


def test_a_folder_with_nothing_to_open_says_what_lies_there(tmp_path):
    folder = tmp_path / "phone"
    folder.mkdir()
    for number in range(3):
        (folder / f"IMG_{number}.HEIC").write_bytes(b"ftypheic")
    assert "no .tar files" in failure_of("data", "inspect", folder)
    assert "no such file or folder" in failure_of("data", "pack", tmp_path / "gone", "--out", "no")
    message = failure_of("data", "pack", folder, "--out", tmp_path / "out")
    assert "3 × format_heic" in message and "converted" in message
    (folder / "a.jpg").write_bytes(encoded())
    message = failure_of("data", "pack", folder, "--out", tmp_path / "out")
    assert "1 pictures and no captions" in message


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_side_cars_in_unicode_are_read_as_they_are_meant(tmp_path, encoding):
    folder = captioned_pictures(tmp_path / "p", ["0.jpg"])
    text = "café “Le Vin” – 日本\r\nsecond"
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (folder / "0.txt").write_bytes((mark + text).encode(encoding))
    assert list_pictures(folder, ListOptions()).pictures[0].captions == (
        "café “Le Vin” – 日本",
        "second",
    )


@pytest.mark.parametrize("encoding", ["cp1252", "cp1251", "shift_jis", "utf-16-le", "utf-32"])
def test_side_cars_in_other_encodings_are_counted_or_named(tmp_path, encoding):
    folder = captioned_pictures(tmp_path / "p", ["0.jpg", "1.jpg"])
    text = {"cp1251": "красный круг", "shift_jis": "赤い丸"}.get(encoding, "café rouge")
    (folder / "1.txt").write_bytes(text.encode(encoding))
    assert packed(tmp_path, folder)[1] == {"caption_not_utf8": 1}
    named = list_pictures(folder, ListOptions(encoding=encoding))
    assert (text,) in [picture.captions for picture in named.pictures]
    # a picture is a picture whatever is wrong with its caption
    assert len(list_pictures(folder, ListOptions(), captions_needed=False).pictures) == 2


def test_pipes_sockets_devices_and_giants_are_never_opened(tmp_path):
    folder = captioned_pictures(tmp_path / "p", ["0.jpg"])
    os.mkfifo(folder / "pipe.jpg")
    os.mkfifo(folder / "0.png")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    with (folder / "giant.jpg").open("wb") as giant:
        giant.truncate(2**40)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "s.jpg"))
    for name in ("pipe", "zero", "giant", "s"):
        (folder / f"{name}.txt").write_text("caption")
    os.mkfifo(folder / "late.txt")
    (folder / "late.jpg").write_bytes(encoded())
    assert packed(tmp_path, folder)[1] == {"not_a_file": 5, "oversized_file": 1}
    names = [path.name for path in folder.glob("*.*g")]
    table = written(
        tmp_path / "t.csv", "filepath,title\n" + "".join(f"p/{name},c\n" for name in names)
    )
    coco = {
        "images": [{"id": n, "file_name": name} for n, name in enumerate(names)],
        "annotations": [{"image_id": n, "caption": "c"} for n in range(len(names))],
    }
    annotations = written(tmp_path / "a.json", json.dumps(coco))
    expected = {"not_a_file": 4, "oversized_file": 1}
    assert packed(tmp_path, table)[1] == expected
    assert packed(tmp_path, annotations, "--images", folder)[1] == expected
    found = open_source(str(table), tiny_recipe().data, 0).ordered(0, 1)
    assert Counter(s.cause for s in found if isinstance(s, BadSample)) == expected


def test_a_pipe_among_shards_is_counted(tmp_path):
    write_shards(tmp_path, [2])
    os.mkfifo(tmp_path / "001.tar")
    found = list(open_source(str(tmp_path), tiny_recipe().data, 0).ordered(0, 1))
    assert [s.cause for s in found if isinstance(s, BadSample)] == ["unreadable_shard"]
    assert len(found) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("t.CSV", r"a table, not a shard; it is packed first: coca-scale data pack .*t\.CSV --out"),
        ("a.json", "packed first: coca-scale data pack .* --images DIR --out"),
        ("photos", "no .tar files in this folder; pictures are packed first: coca-scale data pack"),
        ("photos/0.jpg", "a picture, not a shard"),
        ("notes.md", "neither a shard"),
    ],
)
def test_what_is_no_shard_is_said_to_be_something_else(tmp_path, name, message):
    captioned_pictures(tmp_path / "photos")
    written(tmp_path / "t.CSV", "filepath,title\nphotos/0.jpg,a\n")
    written(tmp_path / "a.json", "{}")
    written(tmp_path / "notes.md", "words")
    with pytest.raises(UserError, match=message):
        raise UserError(failure_of("data", "inspect", tmp_path / name))
    if name != "t.CSV":
        with pytest.raises(DataError, match=message):
            open_source(str(tmp_path / name), tiny_recipe().data, 0)
    else:
        assert open_source(str(tmp_path / name), tiny_recipe().data, 0).count() == 1


def test_inspecting_shards_without_a_usable_sample_fails(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar" * 500)
    assert "no usable sample" in failure_of("data", "inspect", tmp_path / "a.tar")
