"""WebDataset shards as a source of lanes."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from coca_scale.data.epoch_shards import EpochShards, ShardList, ShardRange, expand_shards
from coca_scale.data.manifest import shard_counts
from coca_scale.data.retries import StorageError
from coca_scale.data.rules import LIMITS, SampleRules
from coca_scale.data.sample import (
    EXTENSION,
    NOT_ADJACENT,
    BadSample,
    DataError,
    Position,
    RawSample,
)
from coca_scale.data.storage import PIPE, StorageOptions, is_local, open_shard
from coca_scale.data.tar import BLOCK, Run, TarFault, compression, read_runs

LAST_NUMBER = re.compile(r"(.*?)(\d+)(\D*)")
MAX_GAPS = 100_000
WINDOW_BYTES = 2**32  # of a whole job
INCOMPLETE = ("missing_image", "missing_caption", EXTENSION)


@dataclass(frozen=True)
class Mixed:
    """Shard patterns that share a weight: how often an epoch has each of their shards."""

    patterns: Sequence[str]
    weight: float = 1.0


@dataclass(frozen=True)
class ShardOptions:
    """How shards are read.

    Attributes:
        seed: of order and shuffling.
        window: raw samples of a lane that are shuffled together.
        replacement: draw shards with replacement.
    """

    seed: int
    window: int
    replacement: bool = False


class _Cursor(NamedTuple):
    part: int
    number: int
    byte: int


class ShardSource:
    """Lanes over shards.

    Samples are shuffled inside windows: `window` raw samples in a row, over the borders of shards,
    fewer where they would take more than the lane's share of 4 GiB. So a position is a few numbers,
    not a buffer, and resuming reads on at a byte.
    """

    def __init__(
        self,
        sources: Sequence[Mixed],
        rules: SampleRules,
        options: ShardOptions,
        storage: StorageOptions,
    ) -> None:
        """Raises DataError for patterns that name nothing and manifests that are none."""
        lists = [
            ShardList(url for p in s.patterns for url in expand_shards(p, storage)) for s in sources
        ]
        self.urls = lists[0] if len(lists) == 1 else ShardList(itertools.chain(*lists))
        weights = np.concatenate(
            [np.full(len(found), s.weight) for found, s in zip(lists, sources, strict=True)]
        )
        counts = shard_counts(self.urls, storage)
        self.epochs = EpochShards(weights, counts, options.seed, options.replacement)
        self._rules = rules
        self._options = options
        self._storage = storage

    def check(self) -> None:
        """Local shards must exist, the first remote one must be readable, and the first be a tar.

        Raises:
            DataError: with the number of missing shards and the first of them, or what to do.
        """
        missing = missing_shards(self.urls)
        if missing:
            raise DataError(
                f"{len(missing)} of {len(self.urls)} shards are missing, first: {missing[0]}"
            )
        for url in itertools.islice(filter(is_local, self.urls), 1):
            with contextlib.suppress(OSError):  # counted where it is read
                self._refuse_compressed(url)
        remote = (u for u in self.urls if not is_local(u) and not u.startswith(PIPE))
        for url in itertools.islice(remote, 1):
            try:
                self._refuse_compressed(url)
            except OSError as error:
                reason = "no such shard" if isinstance(error, FileNotFoundError) else error
                raise DataError(f"{url}: {reason}") from error

    def _refuse_compressed(self, url: str) -> None:
        with open_shard(url, StorageOptions(1, self._storage.timeout_seconds)) as file:
            name = compression(file.read(BLOCK))
        if name is not None:
            raise DataError(
                f"{url}: compressed by {name}, and shards are plain tar files; decompress them, or "
                f"let a command do it: 'pipe:{name} -dc {url}'"
            )

    def count(self) -> int | None:
        """Samples of an epoch, if each shard is listed in a manifest beside it."""
        return self.epochs.samples()

    def identity(self) -> str:
        """Digest of the shards' names without their folders, their sizes and weights."""
        digest = sha256(self.epochs.identity().encode())
        for url in self.urls:
            name = url.partition("?")[0].rpartition("/")[2]  # signatures change
            digest.update(f"{name}\n".encode())
        return digest.hexdigest()

    def lane(
        self, lane: int, lanes: int, start: Position
    ) -> Iterator[tuple[Position, RawSample | BadSample]]:
        """The rest of one epoch of a lane."""
        epoch, used = start.epoch, start.used
        parts = self.epochs.parts(lane, lanes, epoch)
        at = _Cursor(start.part, start.number, start.byte)
        entries = self._entries(parts, at)
        while True:
            window, end = self._window(entries, at, WINDOW_BYTES // lanes)
            if not window:
                return
            seed = [self._options.seed, epoch, lane, at.part, at.number]
            order = np.random.default_rng(seed).permutation(len(window))
            for index in range(used, len(window)):
                last = index + 1 == len(window)
                after = Position(epoch, *end) if last else Position(epoch, *at, used=index + 1)
                yield after, window[order[index]]
            at, used = end, 0

    def ordered(self, index: int, stride: int) -> Iterator[RawSample | BadSample]:
        """Every `stride`-th sample from `index` on, shard after shard."""
        samples = itertools.chain.from_iterable(
            read_shard(url, self._rules, self._storage) for url in self.urls
        )
        return itertools.islice(samples, index, None, stride)

    def _window(
        self,
        entries: Iterator[tuple[_Cursor, list[RawSample | BadSample]]],
        at: _Cursor,
        most_bytes: int,
    ) -> tuple[list[RawSample | BadSample], _Cursor]:
        window: list[RawSample | BadSample] = []
        size = 0
        while len(window) < self._options.window and size < most_bytes:
            found = next(entries, None)
            if found is None:
                break
            at, new = found
            window += new
            size += sum(_size(entry) for entry in new)
        return window, at

    def _entries(
        self, parts: Sequence[ShardRange], start: _Cursor
    ) -> Iterator[tuple[_Cursor, list[RawSample | BadSample]]]:
        """Samples of a lane's epoch from `start` on, with the cursor behind each."""
        for number in range(start.part, len(parts)):
            at = start if number == start.part else _Cursor(number, 0, 0)
            url = self.urls[parts[number].shard]
            yield from _read(url, parts[number], at, self._rules, self._storage)


def read_shard(
    url: str, rules: SampleRules, storage: StorageOptions
) -> Iterator[RawSample | BadSample]:
    """Samples of one shard in storage order; whatever breaks in it comes as a BadSample."""
    for _, entries in _read(url, ShardRange(0, 0, None, 1), _Cursor(0, 0, 0), rules, storage):
        yield from entries


def _read(
    url: str, part: ShardRange, at: _Cursor, rules: SampleRules, storage: StorageOptions
) -> Iterator[tuple[_Cursor, list[RawSample | BadSample]]]:
    """A part of a shard from `at` on: what a sample gives, with the cursor behind it."""
    number = at.number
    incomplete: set[int] = set()
    cause = "truncated_shard"
    try:
        with open_shard(url, storage) as file:
            for run in read_runs(file, at.byte, LIMITS):
                if part.stop is not None and number >= part.stop:
                    return
                mine = number >= part.first and (number - part.first) % part.stride == 0
                number += 1
                if mine:
                    yield _Cursor(at.part, number, run.end), _parse(run, url, rules, incomplete)
        if part.stop is None:
            return
    except TarFault as fault:
        cause = fault.cause
    except FileNotFoundError:
        cause = "missing_shard"
    except StorageError:
        cause = "unreadable_shard"
    # of lanes that share a shard of unknown size, the first tells
    lost = int(part.first == 0) if part.stop is None else part.stop - max(number, part.first)
    if lost > 0:
        yield _Cursor(at.part + 1, 0, 0), [BadSample(cause, url, url, lost)]


def _parse(
    run: Run, url: str, rules: SampleRules, incomplete: set[int]
) -> list[RawSample | BadSample]:
    """What a sample gives; `incomplete` has the hashes of keys that came without all they need."""
    found: list[RawSample | BadSample] = [
        BadSample("duplicate_key", run.key, url) for _ in range(run.copies)
    ]
    try:
        if run.fault is not None:
            raise BadSample(run.fault, run.key, url)
        sample = rules.sample(run.key, run.files, url)
        if not sample.captions:
            incomplete.add(hash(run.key))
        found.append(sample)
    except BadSample as bad:
        skipped = bad.skipped
        if skipped.cause in INCOMPLETE:
            if hash(run.key) in incomplete:
                skipped = skipped._replace(cause=NOT_ADJACENT)
            incomplete.add(hash(run.key))
        found.append(BadSample(*skipped))  # without the frames that the other one holds
    return found


def missing_shards(urls: Iterable[str]) -> list[str]:
    """Local shards that are not there; each folder is listed once."""
    names: dict[str, set[str]] = {}
    missing = []
    for url in urls:
        if not is_local(url):
            continue
        folder, _, name = url.rpartition("/")
        if folder not in names:
            names[folder] = set()
            if Path(url).parent.is_dir():
                with os.scandir(Path(url).parent) as entries:
                    names[folder] = {entry.name for entry in entries}
        if name not in names[folder]:
            missing.append(url)
    return missing


def missing_numbers(urls: Iterable[str]) -> list[str]:
    """Numbers that the names leave out between their first and last, such as 00007."""
    found: dict[tuple[str, str, int], list[int]] = {}
    for url in urls:
        if match := LAST_NUMBER.fullmatch(url):
            before, digits, after = match.groups()
            found.setdefault((before, after, len(digits)), []).append(int(digits))
    gaps = []
    for (_, _, width), numbers in found.items():
        there = set(numbers)
        every = range(min(numbers), max(numbers) + 1)
        if len(every) < MAX_GAPS + len(there):  # else they are no running numbers
            gaps += [f"{number:0{width}d}" for number in every if number not in there]
    return gaps


def _size(entry: RawSample | BadSample) -> int:
    image = entry.image if isinstance(entry, RawSample) else b""
    return len(image) if isinstance(image, bytes) else 0
