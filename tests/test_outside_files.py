"""Whatever stands in a file from outside is read, or refused in words: nothing else comes out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from coca_scale.errors import UserError
from tests.fuzz import Reader, escapes
from tests.outside import READERS

FEW, MANY = 200, 100_000


def test_escapes_are_found_whatever_they_are(tmp_path):
    """The seeds pass; of what is made of them some does not."""

    def raising(path: Path) -> None:
        if path.read_bytes() != b"x" * 50:
            raise KeyError("out of its reader")

    def dying(path: Path) -> None:
        if path.read_bytes() != b"x" * 50:
            os._exit(3)

    def refusing(path: Path) -> None:
        if path.read_bytes() != b"x" * 50:
            raise UserError("words")

    def found(read) -> str:
        return "\n".join(escapes(Reader(lambda: [b"x" * 50], read, "f"), "r", 100, tmp_path))

    assert found(refusing) == ""
    assert "KeyError: 'out of its reader'" in found(raising)
    assert "the process ended with 3" in found(dying)


@pytest.mark.parametrize("name", READERS)
def test_no_input_escapes_its_reader(tmp_path, name):
    assert escapes(READERS[name], name, FEW, tmp_path) == []


@pytest.mark.long
@pytest.mark.parametrize("name", READERS)
def test_no_input_of_very_many_escapes_its_reader(tmp_path, name):
    assert escapes(READERS[name], name, MANY, tmp_path) == []
