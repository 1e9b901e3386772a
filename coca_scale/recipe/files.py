"""Small file helpers that every room may use."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import TypeAdapter, ValidationError

from coca_scale.errors import UserError
from coca_scale.recipe.text import decoded

T = TypeVar("T")


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file (hashlib.file_digest needs Python 3.11)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class NoFileError(UserError):
    """A folder, a pipe, a socket or a device where a file is meant."""


def open_regular(path: Path) -> BinaryIO:
    """A file to read; anything else is not opened: it may wait for ever, never end, or act.

    Raises:
        NoFileError: it is something else.
        OSError: it is not there, or cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise NoFileError(f"{path} is not a regular file; move it away")
    return open(path, "rb", opener=without_waiting)


def without_waiting(path: str, flags: int) -> int:
    """An opener for `open` that waits for no other end of a pipe in the place of a file."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_text(path: Path) -> str:
    """A file that a user names or keeps.

    Raises:
        UserError: it is neither UTF-8 nor UTF-16 with its mark.
    """
    try:
        return decoded(path.read_bytes())
    except UnicodeError as error:
        raise UserError(f"{path}: not a text in UTF-8") from error


def parse_json(
    text: str | bytes,
    origin: str,
    take_object: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """What a JSON text says; no number, nesting or character in it raises anything else.

    Args:
        text: the JSON.
        origin: where it is from, for messages.
        take_object: what to make of an object, from its names and values; a dict if not given.

    Raises:
        UserError: it is none.
    """
    try:
        whole = decoded(text) if isinstance(text, bytes) else text
        return json.loads(whole, object_pairs_hook=take_object)
    except UnicodeError as error:
        raise UserError(f"{origin}: not a text in UTF-8") from error
    except RecursionError as error:
        raise UserError(f"{origin}: not readable as JSON: nested too deeply") from error
    except ValueError as error:  # also of numbers with thousands of digits
        raise UserError(f"{origin}: not readable as JSON: {error}") from error


def validated(content: Any, kind: type[T], origin: str) -> T:
    """Plain data as the type that is meant, by pydantic.

    Args:
        content: as it was read.
        kind: a pydantic model, a dataclass, a TypedDict or a type like `dict[str, int]`.
        origin: where it is from, for messages.

    Raises:
        UserError: the first place that does not fit, and how many more there are.
    """
    try:
        return TypeAdapter(kind).validate_python(content)
    except (ValidationError, RecursionError) as error:
        raise UserError(f"{origin}: {_first_fault(error)}") from error


def read_json(path: Path) -> Any:
    """What is in a JSON file.

    Raises:
        UserError: it is none.
    """
    return parse_json(path.read_bytes(), str(path))


def read_json_as(path: Path, kind: type[T]) -> T:
    """What is in a JSON file, as the type that is meant.

    Raises:
        UserError: it is no JSON, or something else.
    """
    return validated(read_json(path), kind, str(path))


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file that may be growing: a last line without its end is left out.

    Raises:
        UserError: a whole line that is no JSON object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield _object(line, f"{path}: line {number}")


def readable_lines(path: Path, kind: type[T], last_bytes: int | None = None) -> Iterator[T | None]:
    """The same as the type that is meant, of a file that a fault of a disk or a person may have
    damaged: None for a line that is something else.

    Args:
        path: of the file.
        kind: of its lines.
        last_bytes: read no more than whole lines of its end; None reads all.
    """
    with open_regular(path) as file:
        if last_bytes is not None:
            before = os.fstat(file.fileno()).st_size - last_bytes - 1
            if before >= 0:
                file.seek(before)
                file.readline()  # the end of one
        for line in file:
            if line.endswith(b"\n"):
                try:
                    yield validated(_object(line, str(path)), kind, str(path))
                except UserError:
                    yield None


def _object(line: bytes, origin: str) -> dict[str, Any]:
    content = parse_json(line, origin)
    if not isinstance(content, dict):
        raise UserError(f"{origin}: not an object")
    return content


def _first_fault(error: ValidationError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    faults = error.errors(include_url=False)
    place = ".".join(str(part) for part in faults[0]["loc"])
    message = faults[0]["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    found = "" if faults[0]["type"] in ("missing", "value_error") else _found(faults[0]["input"])
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{place + ': ' if place else ''}{message}{found}{more}"


def _found(value: object) -> str:
    text = repr(value)
    return f", found {text if len(text) <= 60 else text[:60] + '…'}"
