"""Text and JSON from outside: read as what they are, or refused in one sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coca_scale.errors import UserError
from coca_scale.recipe.files import json_lines, parse_json, read_text, validated
from coca_scale.recipe.text import cleaned, decoded, visible
from coca_scale.recipe.whole_files import whole_file, write_whole
from tests.disks import no_file_over

ANY_TEXT = st.text(st.characters(exclude_categories=()))
WORDS = "café “Le Vin” – a red circle 😀"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_unicode_is_read_whoever_wrote_it(encoding, tmp_path):
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    path = tmp_path / "a.txt"
    path.write_bytes(mark + WORDS.encode(encoding))
    assert read_text(path) == WORDS


def test_other_encodings_are_refused_unless_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("café".encode("cp1252"))
    with pytest.raises(UserError, match="not a text in UTF-8"):
        read_text(path)
    assert decoded(path.read_bytes(), "cp1252") == "café"
    with pytest.raises(UnicodeError):
        decoded("a circle".encode("utf-16-le"))  # without its mark: every second byte is a NUL


@given(ANY_TEXT)
def test_a_cleaned_text_can_be_written_and_steers_no_terminal(text):
    for harmless in (cleaned(text), visible(text)):
        harmless.encode()
        assert not any(c < " " or "\x7f" <= c < "\xa0" for c in harmless if c not in "\t\n")


@given(st.text(st.characters(exclude_categories=("Cc", "Cs"))))
def test_a_text_without_controls_stays_as_it_is(text):
    assert cleaned(text) == visible(text) == text


def test_what_steers_a_terminal_goes_and_what_is_said_stays():
    assert cleaned("a \x1b[31mred\x1b[0m \x1b]0;title\x07cat \ud83d\x00") == "a red cat \ufffd "
    assert visible("\x1b[2Jgone\ud800") == "\\x1b[2Jgone\\ud800"


@given(ANY_TEXT | st.binary())
def test_whatever_is_no_json_is_one_sentence(text):
    try:
        parse_json(text, "a.json")
    except UserError as error:
        assert str(error).startswith("a.json: ")


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, '{"a": 1', "\ufeff{", b"\xff"])
def test_json_that_breaks_parsers_is_one_sentence(text):
    with pytest.raises(UserError, match=r"^a\.json: not "):
        parse_json(text, "a.json")


@given(st.recursive(st.none() | st.booleans() | st.floats() | ANY_TEXT, st.lists, max_leaves=5))
def test_another_type_than_meant_is_one_sentence(content):
    with pytest.raises(UserError, match=r"^a\.json: "):
        validated(content, dict[str, int], "a.json")


def test_the_place_of_the_fault_is_named():
    with pytest.raises(UserError, match=r"^m\.json: b: input should be a valid integer.*null|None"):
        validated({"a": 1, "b": None}, dict[str, int], "m.json")


@pytest.mark.parametrize("line", [b"\xff\xfe\n", b"[1]\n", b"{\n"])
def test_a_line_that_is_no_object_is_named(line, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps({"a": 1}).encode() + b"\n" + line)
    with pytest.raises(UserError, match="line 2"):
        list(json_lines(path))


def save_tensors(path):
    with whole_file(path) as file:  # torch's writer makes an error of its own of a full disk's
        torch.save({"a": torch.zeros(100_000), "b": torch.zeros(9)}, file)


WRITERS = [lambda path: write_whole(path, "line\n" * 20_000), save_tensors]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("room", [0, 10, 5000, 90_000])
def test_a_file_that_cannot_be_written_leaves_what_was_there(write, room, tmp_path):
    path = tmp_path / ("é" * 127)
    path.write_text("before")
    with no_file_over(room), pytest.raises(OSError, match="File too large") as error:
        write(path)
    assert error.value.filename == str(path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    write(path)
    assert path.stat().st_size > 99_000 and list(tmp_path.iterdir()) == [path]


def test_what_is_no_file_is_written_into_and_stays(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    write_whole(link, "words")
    assert link.is_symlink() and target.read_text() == "words"
    (tmp_path / "null").symlink_to("/dev/null")
    write_whole(tmp_path / "null", "words")
    write_whole(Path("/dev/null"), "words")
    assert Path("/dev/null").is_char_device()
    reading, writing = os.pipe()
    write_whole(Path(f"/dev/fd/{writing}"), "words")
    assert os.read(reading, 9) == b"words"
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path, "words")
    os.close(reading)
    os.close(writing)
