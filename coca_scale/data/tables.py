"""Sources with an index: CSV/TSV files and synthetic drawings."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from coca_scale.data.epoch_shards import ShardList
from coca_scale.data.local_files import read_picture
from coca_scale.data.rows import TableOptions, read_rows
from coca_scale.data.sample import BadSample, DataError, Position, RawSample, Skipped


class Indexed(Protocol):
    """A collection whose items may raise BadSample."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> RawSample: ...


class CaptionTable:
    """Rows (image path, caption) of one or more CSV/TSV files; one that cannot be used is a bad
    sample in its place.

    Relative image paths are looked up from the folder of the table.
    """

    def __init__(self, paths: Sequence[str], options: TableOptions) -> None:
        """Raises DataError for a table that is none."""
        self._bad: dict[int, Skipped] = {}
        self._rows = ShardList(self._read(paths, options))

    def _read(self, paths: Sequence[str], options: TableOptions) -> Iterator[str]:
        rows = itertools.chain.from_iterable(read_rows(Path(path), options) for path in paths)
        for number, row in enumerate(rows):
            if isinstance(row, Skipped):
                self._bad[number] = row
                yield ""
            else:
                yield "\0".join(row)  # no NUL is in a row that can be used

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> RawSample:
        """The sample; raises BadSample if it cannot be used."""
        if index in self._bad:
            raise BadSample(*self._bad[index])
        path, _, caption = self._rows[index].partition("\0")
        return RawSample(path, read_picture(Path(path)), ((caption, 1.0),))


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
