"""Rows of CSV and TSV files, each of them read or counted.

Where tabs separate, a line is a row and quotes are characters like others, as the tools of CC3M,
CC12M and OpenCLIP write them; only what pandas makes of a field with quotes, `"a ""b"" c"`, is
undone. Where commas (or semicolons) separate, RFC 4180 holds, and a quote that is never closed is
an error rather than the end of all rows behind it.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from coca_scale.data.naming import is_picture, undecodable_cause
from coca_scale.data.sample import DataError, Skipped
from coca_scale.recipe.text import marked_encoding, visible

MAX_LINE_CHARACTERS = 2**20
_SHOWN_CHARACTERS = 200
_UNDECODABLE, _NUL = "\udcff", "\udc00"  # no decoder gives them
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_SEPARATOR = re.compile(r'"?sep=([,;|\t])"?')  # which Excel writes, and needs, before a header
_LINE_ENDS = re.compile(r"\r\n|\r|\n")
_MARKING = "coca_scale.mark"

codecs.register_error(_MARKING, lambda error: (_UNDECODABLE, getattr(error, "end", 0)))
csv.field_size_limit(MAX_LINE_CHARACTERS)

NumberedFields = Iterator[tuple[int, list[str]]]


@dataclass(frozen=True)
class TableOptions:
    """How to read a table.

    Attributes:
        image_column: with the path, from the folder of the table.
        caption_column: with the caption.
        captions_needed: whether there must be a column with captions.
        encoding: None is UTF-8, or UTF-16 with its mark.
    """

    image_column: str
    caption_column: str
    captions_needed: bool = True
    encoding: str | None = None


def read_rows(path: Path, options: TableOptions) -> Iterator[tuple[str, str] | Skipped]:
    """Image paths and captions, which may be empty; for a row that cannot be used, why.

    Causes: short_row, long_row (fewer or more fields than columns), broken_row (with a NUL),
    caption_not_…, missing_image.
    A tab in the first line means that tabs separate: OpenCLIP's .csv files have them as well.

    Raises:
        DataError: no such file, columns missing, a quote that is not closed, or no rows.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    with path.open("rb") as raw:
        encoding = options.encoding or marked_encoding(raw.read(4))
    try:
        with path.open(newline="", encoding=encoding, errors=_MARKING) as file:
            yield from _rows(path, file, options)
    except UnicodeError as error:  # of decoders that do not ask what to do
        raise DataError(f"{path}: not a text in {encoding}") from error


def _rows(path: Path, file: TextIO, options: TableOptions) -> Iterator[tuple[str, str] | Skipped]:
    lines = _lines(file, path)
    written = ((n, line) for n, line in lines if line.strip())
    number, first = next(written, (0, ""))
    first = first.removeprefix("\ufeff")  # where somebody says that UTF-8 is UTF-8
    said = _SEPARATOR.fullmatch(first.rstrip("\r\n "))
    if said is not None:
        number, first = next(written, (0, ""))
    delimiter = said[1] if said is not None else _delimiter(path, first)
    numbered = itertools.chain([(number, first)], lines)
    rows = _tabbed(numbered) if delimiter == "\t" else _quoted(numbered, delimiter, path)
    header = [name.strip() for name in next(rows, (0, []))[1]]
    if any(_SURROGATE.search(name) for name in header):
        known = options.encoding or "UTF-8"
        raise DataError(f"{path}: not a text in {known}; --encoding says what it is")
    reader = _RowReader(path, header, delimiter, options)
    empty = True
    for line, fields in rows:
        empty = False
        yield reader.row(line, fields)
    if empty:
        raise DataError(f"{path}: no rows")


def _delimiter(path: Path, header: str) -> str:
    if path.suffix.lower() == ".tsv" or "\t" in header:
        return "\t"
    return ";" if ";" in header and "," not in header else ","


def _lines(file: TextIO, path: Path) -> Iterator[tuple[int, str]]:
    for number in itertools.count(1):
        line = file.readline(MAX_LINE_CHARACTERS + 1)
        if not line:
            return
        if len(line) > MAX_LINE_CHARACTERS:
            raise DataError(f"{path}: line {number}: over a million characters; is it a table?")
        yield number, line.replace("\0", _NUL)


def _tabbed(lines: Iterable[tuple[int, str]]) -> NumberedFields:
    """A line is a row; empty ones are none. Names in quotes mean that everything is in quotes."""
    every = None
    for number, line in lines:
        text = line.rstrip("\r\n")
        if not text:
            continue
        fields = text.split("\t")
        if every is None:
            every = all(len(f) > 1 and f[0] == f[-1] == '"' for f in fields)
        yield number, [_unquoted(field, every) for field in fields]


def _unquoted(field: str, every: bool) -> str:
    """A field as it was before pandas or the like put it in quotes, if they have done so."""
    inside = field[1:-1]
    if len(field) < 2 or not field[0] == field[-1] == '"':
        return field
    if '"' in inside.replace('""', "") or not (every or '""' in inside):
        return field
    return inside.replace('""', '"')


def _quoted(lines: Iterable[tuple[int, str]], delimiter: str, path: Path) -> NumberedFields:
    """Rows by RFC 4180, each with the line that it begins in; empty lines are none."""
    last = 0

    def texts() -> Iterator[str]:
        nonlocal last
        for number, line in lines:
            last = number
            yield line

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    while True:
        begin = last + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise _unclosed(path, begin, str(error)) from error
        if fields is None:
            return
        if fields:
            yield begin, fields


def _unclosed(path: Path, line: int, why: str) -> DataError:
    return DataError(
        f"{path}: line {line}: a field begins with a quote that does not end it ({why}); quotes "
        "inside a field are doubled"
    )


class _RowReader:
    """Takes what is needed out of rows; raises DataError for a header without it."""

    def __init__(
        self, path: Path, header: Sequence[str], delimiter: str, options: TableOptions
    ) -> None:
        self._path = path
        self._options = options
        self._delimiter = delimiter
        self._columns = len(header)
        self._image = self._place(header, options.image_column)
        needed = options.captions_needed or options.caption_column in header
        self._caption = self._place(header, options.caption_column) if needed else None
        self._cause = undecodable_cause(options.encoding)

    def _place(self, header: Sequence[str], column: str) -> int:
        if header.count(column) == 1:
            return header.index(column)
        if column in header:
            raise DataError(f"{self._path}: several columns are called {column!r}; rename one")
        found = visible(", ".join(header)) or "nothing"
        found = found if len(found) <= _SHOWN_CHARACTERS else found[:_SHOWN_CHARACTERS] + "…"
        raise DataError(
            f"{self._path}: no column {column!r}, found {found}; the first line names the columns: "
            "set data.image_column and data.caption_column (--image-column and --caption-column on "
            "the command line)"
        )

    def row(self, line: int, fields: Sequence[str]) -> tuple[str, str] | Skipped:
        """Path and caption of a row, or why it cannot be used.

        Raises:
            DataError: it is several.
        """
        if any("\n" in field or "\r" in field for field in fields):
            self._see_that_it_is_one(line, fields)
        name = f"{self._path}: line {line}"
        if any(fields[self._columns :]):
            return Skipped("long_row", name)
        needed = self._image if self._caption is None else max(self._image, self._caption)
        if len(fields) <= needed:
            return Skipped("short_row", name)
        image = fields[self._image].strip()
        caption = "" if self._caption is None else fields[self._caption]
        if _NUL in image or _NUL in caption:
            return Skipped("broken_row", name)
        if _SURROGATE.search(image) or _SURROGATE.search(caption):
            return Skipped(self._cause, name)
        if not image:
            return Skipped("missing_image", name)
        return str(self._path.parent / image), caption

    def _see_that_it_is_one(self, line: int, fields: Sequence[str]) -> None:
        """A field over several lines, one of which is a row with a picture, was never meant."""
        for field in fields:
            pieces = _LINE_ENDS.split(field)
            for piece in pieces if len(pieces) > 1 else ():
                cells = piece.split(self._delimiter)
                if 1 < len(cells) > self._image and is_picture(cells[self._image].strip()):
                    raise _unclosed(self._path, line, "other rows are inside of it")
