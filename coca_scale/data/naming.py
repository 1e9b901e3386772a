"""What the name of a local file says: a picture, a table, an annotation file, or none of these."""

from __future__ import annotations

import re
from pathlib import Path

from coca_scale.data.images import IMAGE_EXTENSIONS
from coca_scale.data.sample import FORMAT, OTHER_ENCODING

SIDE_CAR = ".txt"
TABLES = (".csv", ".tsv")
ANNOTATIONS = ".json"
_PICTURES = frozenset(f".{extension}" for extension in IMAGE_EXTENSIONS)
# lie beside pictures without being meant as ones
_COMPANIONS = frozenset({SIDE_CAR, ANNOTATIONS, *TABLES, ".parquet"})
_PLAIN_SUFFIX = re.compile(r"\.[a-z0-9]{1,8}")


def is_picture(name: str | Path) -> bool:
    """Whether it is called as pictures are that can be opened."""
    return Path(name).suffix.lower() in _PICTURES


def is_table(name: str | Path) -> bool:
    """Whether it is called as tables are."""
    return Path(name).suffix.lower() in TABLES


def is_annotation_file(name: str | Path) -> bool:
    """Whether it is called as annotation files are."""
    return Path(name).suffix.lower() == ANNOTATIONS


def is_side_car(name: str | Path) -> bool:
    """Whether it is called as caption files are."""
    return Path(name).suffix.lower() == SIDE_CAR


def is_companion(name: str | Path) -> bool:
    """Whether it may lie beside pictures without being one: a caption, a table, a hidden file."""
    path = Path(name)
    return path.suffix.lower() in _COMPANIONS or path.name.startswith(".")


def format_cause(name: str | Path) -> str:
    """Why a file of another kind is left out: `format_heic`, by its name."""
    suffix = Path(name).suffix.lower()
    return FORMAT + (suffix[1:] if _PLAIN_SUFFIX.fullmatch(suffix) else "unknown")


def undecodable_cause(encoding: str | None) -> str:
    """Why a caption in another encoding is left out."""
    return OTHER_ENCODING + (encoding or "utf8")
