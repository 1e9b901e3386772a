"""Sources with an index: CSV/TSV files and synthetic drawings."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from coca_scale.data.sample import BadSample, DataError, Position, RawSample

TABLE_SUFFIXES = (".csv", ".tsv")


class Indexed(Protocol):
    """A collection whose items may raise BadSample."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> RawSample: ...


class CaptionTable:
    """Rows (image path, caption) of one or more CSV/TSV files.

    Relative image paths are looked up from the folder of the table.
    """

    def __init__(self, paths: Sequence[str], image_column: str, caption_column: str) -> None:
        self._rows: list[tuple[str, str]] = []
        for path in paths:
            self._rows += read_table(Path(path), image_column, caption_column)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> RawSample:
        path, caption = self._rows[index]
        try:
            return RawSample(path, Path(path).read_bytes(), ((caption, 1.0),))
        except OSError as error:
            raise BadSample("missing_image", path) from error


def read_table(
    path: Path, image_column: str, caption_column: str, captions_needed: bool = True
) -> list[tuple[str, str]]:
    """Image paths and captions of a .csv or .tsv file; without need, captions may be empty.

    A tab in the first line means that tabs separate: OpenCLIP's .csv files have them as well.

    Raises:
        DataError: no such file, not UTF-8, columns missing, or no rows.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            delimiter = "\t" if path.suffix == ".tsv" or "\t" in file.readline() else ","
            file.seek(0)
            reader = csv.DictReader(file, delimiter=delimiter)
            columns = reader.fieldnames or []
            for column in (image_column, caption_column)[: 1 + captions_needed]:
                if column not in columns:
                    raise DataError(
                        f"{path}: no column {column!r}, found {', '.join(columns) or 'nothing'}; "
                        "set data.image_column and data.caption_column (--image-column and "
                        "--caption-column on the command line)"
                    )
            rows = [
                (str(path.parent / (row[image_column] or "")), row.get(caption_column) or "")
                for row in reader
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a readable table: {error}") from error
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


class IndexedSource:
    """Lanes over an indexed collection: equal slices of one seeded permutation per epoch."""

    def __init__(self, items: Indexed, name: str, seed: int) -> None:
        self._items = items
        self._name = name
        self._seed = seed

    def check(self) -> None:
        """Nothing to check: the index is the data."""

    def count(self) -> int:
        """Number of items."""
        return len(self._items)

    def identity(self) -> str:
        """The number of items: their order follows from it and the seed."""
        return str(len(self._items))

    def lane(
        self, lane: int, lanes: int, start: Position
    ) -> Iterator[tuple[Position, RawSample | BadSample]]:
        """The rest of one epoch of a lane."""
        count = len(self._items)
        if count < lanes:
            raise DataError(
                f"{self._name}: {count} samples for {lanes} lanes; "
                "lower data.lanes or train.global_batch"
            )
        order = _permutation(count, self._seed, start.epoch)
        mine = order[lane * count // lanes : (lane + 1) * count // lanes]
        for used in range(start.used, len(mine)):
            yield Position(start.epoch, used=used + 1), self._get(int(mine[used]))

    def ordered(self, index: int, stride: int) -> Iterator[RawSample | BadSample]:
        """Every `stride`-th item from `index` on."""
        for i in range(index, len(self._items), stride):
            yield self._get(i)

    def _get(self, index: int) -> RawSample | BadSample:
        try:
            return self._items[index]
        except BadSample as bad:
            return bad


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)
