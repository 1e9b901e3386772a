"""Which shards an epoch has, in which order, and which part of them a lane reads.

Only the recipe and the seed decide: no rank, no worker, no state.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import braceexpand
import numpy as np

from coca_scale.data.naming import is_annotation_file, is_picture, is_table
from coca_scale.data.remote import list_remote
from coca_scale.data.retries import StorageError
from coca_scale.data.sample import DataError
from coca_scale.data.storage import PIPE, StorageOptions, is_local

_MAGIC = slice(257, 262)  # of a tar file
UNLISTED = (PIPE, "http://", "https://")
_ANY_NAME = ("utf-8", "surrogatepass")  # names of files need not be text


class ShardList(Sequence[str]):
    """Urls as one block of bytes, which forked loader processes share with their parent."""

    def __init__(self, urls: Iterator[str]) -> None:
        ends = [0]
        blob = bytearray()
        for url in urls:
            blob += url.encode(*_ANY_NAME)
            ends.append(len(blob))
        self._blob = bytes(blob)
        self._ends = np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._blob[self._ends[index] : self._ends[index + 1]].decode(*_ANY_NAME)


def expand_shards(pattern: str, storage: StorageOptions) -> Iterator[str]:
    """Shard urls and paths named by a brace or glob pattern, or all .tar files of a folder.

    Raises:
        DataError: a pattern that names nothing or what is no shard, or a bucket that cannot be
            listed.
    """
    names: Iterator[str]
    try:
        names = braceexpand.braceexpand(pattern)
    except ValueError as error:
        raise DataError(f"{pattern}: unbalanced braces") from error
    local = is_local(pattern)
    if local:
        _see_that_it_may_be_shards(pattern)
    if local and Path(pattern).is_dir():
        names = iter([f"{glob.escape(pattern.rstrip('/'))}/*.tar"])
    elif not any(c in pattern for c in ("*?[" if local else "*")) or pattern.startswith(UNLISTED):
        yield from names  # there may be 200,000
        return
    for name in names:
        try:
            if local:
                found = sorted(glob.glob(name))
            else:
                found = list_remote(name, storage.retries, storage.timeout_seconds)
        except (StorageError, FileNotFoundError) as error:
            raise DataError(str(error)) from error
        if not found:
            raise DataError(f"{pattern}: matches nothing")
        yield from found


def _see_that_it_may_be_shards(name: str) -> None:
    """Raises DataError with what a local name is instead, and what becomes of that."""
    path = Path(name)
    if path.suffix == ".tar":
        return  # there may be 200,000
    if path.is_dir():
        if not any(path.glob("*.tar")):
            raise DataError(f"{name}: no .tar files in this folder; pictures are {_packed(name)}")
        return
    if not path.is_file():
        return
    if is_table(name):
        raise DataError(f"{name}: a table, not a shard; it is {_packed(name)}")
    if is_annotation_file(name):
        packed = _packed(f"{name} --images DIR")
        raise DataError(f"{name}: a .json, not a shard; COCO's and Karpathy's are {packed}")
    if is_picture(name):
        raise DataError(f"{name}: a picture, not a shard; a folder of them is {_packed('FOLDER')}")
    if ".tar" not in path.name and not _begins_as_tar(path):
        raise DataError(f"{name}: neither a shard (.tar) nor a picture in a format that is opened")


def _packed(what: str) -> str:
    return f"packed first: coca-scale data pack {what} --out SHARDS"


def _begins_as_tar(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(_MAGIC.stop)[_MAGIC] == b"ustar"


class ShardRange(NamedTuple):
    """Samples first, first + stride, … before stop of a shard; stop None reads to its end."""

    shard: int
    first: int
    stop: int | None
    stride: int


class EpochShards:
    """The shards of every epoch.

    Without replacement an epoch has every shard `weight` times (for a fraction, seeded shards take
    turns); with replacement it has as many draws, each with a chance in proportion to the weight.
    """

    def __init__(
        self,
        weights: np.ndarray,
        counts: np.ndarray | None,
        seed: int,
        replacement: bool,
    ) -> None:
        """For float [shards] `weights`, and int [shards] sample `counts` if all are known.

        Raises:
            DataError: the weights give an epoch less than one shard.
        """
        self._weights = weights
        self._counts = counts
        self._seed = seed
        self._replacement = replacement
        self._turns = np.random.default_rng([seed]).permutation(len(weights)) / len(weights)
        if weights.sum() < 1 or not len(self.order(0)):
            raise DataError("the weights in data.train give an epoch less than one shard")

    def identity(self) -> str:
        """Digest of all that decides the order, but for the seed and the names."""
        counts = b"" if self._counts is None else self._counts.tobytes()
        return sha256(self._weights.tobytes() + counts + bytes([self._replacement])).hexdigest()

    @property
    def counted(self) -> bool:
        """Whether the size of every shard is known."""
        return self._counts is not None

    def samples(self) -> int | None:
        """Samples of an epoch, on average where weights are fractions; None if unknown."""
        return None if self._counts is None else round(float(self._weights @ self._counts))

    def order(self, epoch: int) -> np.ndarray:
        """Shard numbers of an epoch, int64."""
        return _order(self, epoch)

    def _draw(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, epoch])
        count = len(self._weights)
        if self._replacement:
            draws = max(1, round(float(self._weights.sum())))
            return rng.choice(count, draws, p=self._weights / self._weights.sum())
        before = np.floor(epoch * self._weights + self._turns)
        copies = (np.floor((epoch + 1) * self._weights + self._turns) - before).astype(np.int64)
        if not copies.any():  # small weights can leave an epoch without a turn
            copies[np.argmax(self._weights)] = 1
        return rng.permutation(np.repeat(np.arange(count), copies))

    def parts(self, lane: int, lanes: int, epoch: int) -> list[ShardRange]:
        """What a lane reads in an epoch, in order.

        Where the sizes are known the epoch is cut into equal ranges of samples. Where not, whole
        shards are dealt; lanes that outnumber them stride through shared ones.

        Raises:
            DataError: fewer samples than lanes.
        """
        order = self.order(epoch)
        if self._counts is not None:
            return self._ranges(order, _ends(self, epoch), lane, lanes)
        if len(order) >= lanes:
            return [ShardRange(int(shard), 0, None, 1) for shard in order[lane::lanes]]
        index = lane % len(order)
        sharing = len(range(index, lanes, len(order)))
        return [ShardRange(int(order[index]), lane // len(order), None, sharing)]

    def _ranges(
        self, order: np.ndarray, ends: np.ndarray, lane: int, lanes: int
    ) -> list[ShardRange]:
        assert self._counts is not None
        total = int(ends[-1])
        if total < lanes:
            raise DataError(
                f"{total} samples for {lanes} lanes; lower data.lanes or train.global_batch"
            )
        low, high = lane * total // lanes, (lane + 1) * total // lanes
        parts = []
        for index in range(
            int(np.searchsorted(ends, low, side="right")),
            int(np.searchsorted(ends, high, side="left")) + 1,
        ):
            shard = int(order[index])
            count = int(self._counts[shard])
            begin = int(ends[index]) - count
            first, stop = max(low - begin, 0), min(high - begin, count)
            if first < stop:
                parts.append(ShardRange(shard, first, stop, 1))
        return parts


@lru_cache(maxsize=4)
def _order(plan: EpochShards, epoch: int) -> np.ndarray:
    return plan._draw(epoch)


@lru_cache(maxsize=4)
def _ends(plan: EpochShards, epoch: int) -> np.ndarray:
    assert plan._counts is not None
    return np.cumsum(plan._counts[plan.order(epoch)])
