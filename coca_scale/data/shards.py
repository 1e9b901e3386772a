"""WebDataset shards as a source of lanes."""

from __future__ import annotations

import glob
import itertools
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np
from webdataset.tariterators import tarfile_samples

from coca_scale.data.sample import BadSample, DataError, Position, RawSample

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MANIFEST = "manifest.json"


def expand_shards(patterns: Sequence[str]) -> list[str]:
    """Shard urls and paths named by brace and glob patterns, in order.

    Raises:
        DataError: a pattern that names nothing.
    """
    urls: list[str] = []
    for pattern in patterns:
        try:
            names = list(braceexpand.braceexpand(pattern))
        except ValueError as error:
            raise DataError(f"{pattern}: unbalanced braces") from error
        for name in names:
            if is_local(name) and any(c in name for c in "*?["):
                found = sorted(glob.glob(name))
                if not found:
                    raise DataError(f"{pattern}: matches no file")
                urls += found
            else:
                urls.append(name)
    return urls


def is_local(url: str) -> bool:
    """Whether a shard is a plain file."""
    return "://" not in url and not url.startswith("pipe:")


class ShardSource:
    """Lanes over shards: a seeded permutation of the shards per epoch, dealt to the lanes.

    With fewer shards than lanes, lanes share a shard and stride through its samples. Samples are
    shuffled inside windows of `window` raw samples, so a position is two numbers, not a buffer.
    """

    def __init__(self, urls: Sequence[str], seed: int, window: int) -> None:
        self._urls = list(urls)
        self._seed = seed
        self._window = window

    def check(self) -> None:
        """Every local shard must exist.

        Raises:
            DataError: with the number of missing shards and the first of them.
        """
        missing = [url for url in self._urls if is_local(url) and not Path(url).is_file()]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(self._urls)} shards are missing, first: {missing[0]}"
            )

    def count(self) -> int | None:
        """Samples in all shards, if each is listed in the manifest.json beside it."""
        total = 0
        counts: dict[Path, dict[str, int]] = {}
        for url in self._urls:
            folder = Path(url).parent
            if folder not in counts:
                counts[folder] = _manifest_counts(folder) if is_local(url) else {}
            if Path(url).name not in counts[folder]:
                return None
            total += counts[folder][Path(url).name]
        return total

    def lane(
        self, lane: int, lanes: int, start: Position
    ) -> Iterator[tuple[Position, RawSample | BadSample]]:
        """The rest of one epoch of a lane."""
        deal = self._deal(lane, lanes, start.epoch)
        for part in range(start.part, len(deal)):
            shard, index, stride = deal[part]
            used = start.offset if part == start.part else 0
            samples = itertools.islice(read_shard(self._urls[shard]), index, None, stride)
            seed = [self._seed, start.epoch, shard, index]
            for offset, sample in _shuffle_windows(samples, self._window, seed, used):
                yield Position(start.epoch, part, offset + 1), sample

    def ordered(self, index: int, stride: int) -> Iterator[RawSample | BadSample]:
        """Every `stride`-th sample from `index` on, shard after shard."""
        samples = itertools.chain.from_iterable(read_shard(url) for url in self._urls)
        return itertools.islice(samples, index, None, stride)

    def _deal(self, lane: int, lanes: int, epoch: int) -> list[tuple[int, int, int]]:
        """Shards of a lane in an epoch, as (shard, first sample, stride)."""
        count = len(self._urls)
        order = np.random.default_rng([self._seed, epoch]).permutation(count)
        if count >= lanes:
            return [(int(shard), 0, 1) for shard in order[lane::lanes]]
        place = lane % count
        sharing = (lanes - place + count - 1) // count
        return [(int(order[place]), lane // count, sharing)]


def _shuffle_windows(
    samples: Iterator[RawSample | BadSample], window: int, seed: list[int], used: int
) -> Iterator[tuple[int, RawSample | BadSample]]:
    """Samples with their number, shuffled inside windows, after the first `used`."""
    first = used // window
    samples = itertools.islice(samples, first * window, None)
    for number in itertools.count(first):
        buffer = list(itertools.islice(samples, window))
        if not buffer:
            return
        order = np.random.default_rng([*seed, number]).permutation(len(buffer))
        for place in range(max(0, used - number * window), len(buffer)):
            yield number * window + place, buffer[order[place]]


def read_shard(url: str) -> Iterator[RawSample | BadSample]:
    """Samples of one shard in storage order; whatever breaks in it comes out as a BadSample."""
    try:
        for fields in tarfile_samples([{"url": url}]):
            yield _parse(fields)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        # ValueError: webdataset's word for duplicated names and unknown url schemes
        cause = "missing_shard" if isinstance(error, FileNotFoundError) else "broken_shard"
        yield BadSample(cause, url)


def _parse(fields: Mapping[str, Any]) -> RawSample | BadSample:
    key = str(fields["__key__"])
    image = next((fields[e] for e in IMAGE_EXTENSIONS if e in fields), None)
    if image is None:
        return BadSample("missing_image", key)
    try:
        if "txt" in fields:
            caption = fields["txt"].decode("utf-8")
        elif "json" in fields:
            caption = json.loads(fields["json"])["caption"]
        else:
            return BadSample("missing_caption", key)
    except UnicodeDecodeError:
        return BadSample("caption_not_utf8", key)
    except (json.JSONDecodeError, KeyError, TypeError):
        return BadSample("missing_caption", key)
    if not isinstance(caption, str):
        return BadSample("missing_caption", key)
    return RawSample(key, image, caption)


def _manifest_counts(folder: Path) -> dict[str, int]:
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        shards = json.loads(path.read_text())["shards"]
        return {str(shard["name"]): int(shard["samples"]) for shard in shards}
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a manifest written by coca-scale data pack") from error
