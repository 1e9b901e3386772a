"""Files that data name: regular ones alone, and no more of them than a sample may have."""

from __future__ import annotations

import os
from pathlib import Path

from coca_scale.data.rules import MAX_IMAGE_BYTES, MAX_TEXT_BYTES
from coca_scale.data.sample import BadSample
from coca_scale.recipe.files import NoFileError, open_regular


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
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise BadSample("oversized_file", str(path))
            return file.read(size)
    except NoFileError as error:
        raise BadSample("not_a_file", str(path)) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL or half a character in the name
        raise BadSample(missing, str(path)) from error
