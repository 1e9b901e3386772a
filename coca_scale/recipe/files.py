"""Small file helpers that every room may use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coca_scale.errors import UserError


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file (hashlib.file_digest needs Python 3.11)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_text(path: Path) -> str:
    """A file that a user names or keeps.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text in UTF-8") from error


def read_json(path: Path) -> Any:
    """What is in a JSON file.

    Raises:
        UserError: it is none.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file that may be growing: a last line without its end is left out.

    Raises:
        UserError: a whole line that is no JSON.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.endswith("\n"):
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path}: line {number} is no JSON: {error}") from error
