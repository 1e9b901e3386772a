"""Files that data name: regular ones alone, and no more of them than a sample may have."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from coca_scale.data.rules import MAX_IMAGE_BYTES, MAX_TEXT_BYTES
from coca_scale.data.sample import BadSample


def read_picture(path: Path) -> bytes:
    """The content of a picture file.

    Raises:
        BadSample: missing_image, not_a_file, oversized_file.
    """
    return _read_regular(path, MAX_IMAGE_BYTES, "missing_image")


def read_side_car(path: Path) -> bytes:
    """The content of a caption file.

    Raises:
        BadSample: missing_caption, not_a_file, oversized_file.
    """
    return _read_regular(path, MAX_TEXT_BYTES, "missing_caption")


def _read_regular(path: Path, most: int, missing: str) -> bytes:
    """A pipe, a socket or a device is never opened: it may wait for ever, never end, or act."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise BadSample("not_a_file", str(path))
        if about.st_size > most:
            raise BadSample("oversized_file", str(path))
        with open(path, "rb", opener=_without_waiting) as file:
            return file.read(about.st_size) or b""
    except (OSError, ValueError) as error:  # ValueError: a NUL or half a character in the name
        raise BadSample(missing, str(path)) from error


def _without_waiting(path: str, flags: int) -> int:
    """Open, but not wait for the other end of a pipe that has come into the place of a file."""
    return os.open(path, flags | os.O_NONBLOCK)
