"""Captions from outside, whoever wrote them: clean lines before anything else sees them."""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coca_scale.data.listing import ListOptions, PictureFiles, list_pictures
from coca_scale.data.rules import SampleRules
from coca_scale.data.sample import BadSample, DataError, RawSample
from coca_scale.data.tables import CaptionTable
from coca_scale.data.tokens import make_tokenizer
from coca_scale.evaluation.zeroshot import class_folders, make_classes
from coca_scale.model import load_model_config
from coca_scale.recipe.data import DataFilters
from tests.data.shards import encoded

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=30)
ESCAPES = "\ud800 a red \x1b[31mcat\x1b[0m\x1b]0;owned\x07\x00\u2028 on\ta\x9b mat "
RULES = SampleRules({}, DataFilters())
TOKENIZER = make_tokenizer(load_model_config("coca_tiny"))
PICTURE = encoded()


def from_json_in_a_shard(text: str, _: Path) -> RawSample:
    return RULES.sample("k", {"jpg": PICTURE, "json": json.dumps({"caption": text}).encode()}, "")


def from_txt_in_a_shard(text: str, _: Path) -> RawSample:
    return RULES.sample("k", {"jpg": PICTURE, "txt": text.encode("utf-8", "replace")}, "")


def from_an_annotation_file(text: str, folder: Path) -> RawSample:
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 1, "caption": text}],
    }
    (folder / "coco.json").write_text(json.dumps(content))
    listed = list_pictures(folder / "coco.json", ListOptions(images=folder))
    return PictureFiles(listed)[0]


def from_a_side_car(text: str, folder: Path) -> RawSample:
    (folder / "a.txt").write_bytes(text.encode("utf-8", "replace"))
    return PictureFiles(list_pictures(folder, ListOptions()))[0]


def from_a_table(text: str, folder: Path) -> RawSample:
    with (folder / "t.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, quoting=csv.QUOTE_ALL)
        safe = text.encode("utf-8", "replace").decode()
        rows.writerows([["filepath", "title"], ["a.jpg", safe]])
    return CaptionTable([str(folder / "t.csv")], "filepath", "title")[0]


READERS = (
    from_json_in_a_shard,
    from_txt_in_a_shard,
    from_an_annotation_file,
    from_a_side_car,
    from_a_table,
)


def assert_harmless(text: str) -> None:
    """It can be written, steers no terminal, and stays in its line."""
    text.encode()
    assert not any(c < " " or "\x7f" <= c < "\xa0" for c in text)
    assert len(text.splitlines()) == 1
    assert text == text.strip() != ""


@pytest.mark.parametrize("read", READERS)
@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT)
def test_whatever_a_reader_finds_is_clean_or_a_bad_sample(read, text):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.jpg").write_bytes(PICTURE)
        try:
            sample = read(text, Path(folder))
        except (BadSample, DataError):
            return
    for caption, _ in sample.captions:
        assert_harmless(caption)
        TOKENIZER([caption])


@pytest.mark.parametrize("read", [from_json_in_a_shard, from_an_annotation_file])
def test_what_is_said_stays(read, tmp_path):
    (tmp_path / "a.jpg").write_bytes(PICTURE)
    assert read(ESCAPES, tmp_path).caption == "\ufffd a red cat   on a  mat"


@pytest.mark.parametrize("text", ["\x1b[2J", "\x00\x07", " \u2028\t", "\x1b]0;title\x07 "])
def test_a_caption_of_controls_alone_is_empty(text, tmp_path):
    with pytest.raises(BadSample, match="empty_caption"):
        from_json_in_a_shard(text, tmp_path)


@pytest.mark.parametrize("kind", ["txt", "json"])
@pytest.mark.parametrize(
    ("encoding", "is_text"),
    [("utf-8-sig", True), ("utf-16", True), ("utf-16-le", False), ("cp1252", False)],
)
def test_text_of_shards_is_unicode_in_any_of_its_forms(kind, encoding, is_text):
    words = "a café"
    text = words if kind == "txt" else json.dumps({"caption": words}, ensure_ascii=False)
    files = {"jpg": PICTURE, kind: text.encode(encoding)}
    if is_text:
        assert RULES.sample("k", files, "").caption == words
    else:
        with pytest.raises(BadSample, match="caption_not_utf8"):
            RULES.sample("k", files, "")


def test_a_caption_that_would_take_for_ever_is_cut_in_every_reader(tmp_path):
    (tmp_path / "a.jpg").write_bytes(PICTURE)
    for read in READERS:
        assert len(read("x" * 50_000, tmp_path).caption) == 4096


def test_names_of_files_that_are_no_text_can_be_written(tmp_path):
    name = b"caf\xe9\x1b[2J.jpg".decode("utf-8", "surrogateescape")
    (tmp_path / name).write_bytes(PICTURE)
    sample = PictureFiles(list_pictures(tmp_path, ListOptions(), captions_needed=False))[0]
    assert sample.key == str(tmp_path / "caf\\udce9\\x1b[2J.jpg")


def test_classes_and_templates_are_clean(tmp_path):
    for name in (b"n\xe9e", b"a\x1b[2J_dog"):
        folder = tmp_path / name.decode("utf-8", "surrogateescape")
        folder.mkdir()
        (folder / "1.jpg").write_bytes(PICTURE)
    (tmp_path / "templates.txt").write_bytes("\ufeffa \x1b[1mphoto of {}\r\n\r\n".encode())
    names, _ = class_folders(tmp_path)
    prompts = make_classes(None, str(tmp_path / "templates.txt"), names).prompts()
    assert prompts == ["a photo of a dog", "a photo of n\ufffde"]
    assert TOKENIZER(prompts).shape == (2, 16)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(3, 1023), max_size=14))
def test_whatever_a_model_writes_is_a_clean_line(ids):
    text = TOKENIZER.decode([TOKENIZER.start_id, *ids])
    if text:
        assert_harmless(text)
