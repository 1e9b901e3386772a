"""Pictures to look at with a model: from files, folders, tables, shards or synthetic data."""

from __future__ import annotations

import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from coca_scale.data.epoch_shards import expand_shards
from coca_scale.data.images import decode_image, eval_pixels
from coca_scale.data.listing import (
    ListedPicture,
    Listing,
    ListOptions,
    PictureFiles,
    list_pictures,
)
from coca_scale.data.naming import is_annotation_file, is_picture, is_table
from coca_scale.data.rules import SampleRules
from coca_scale.data.sample import BadSample, DataError, RawSample, Source
from coca_scale.data.shards import missing_shards, read_shard
from coca_scale.data.sources import storage_options
from coca_scale.data.storage import is_local
from coca_scale.data.synthetic import Shapes
from coca_scale.data.tables import IndexedSource
from coca_scale.model import ModelConfig
from coca_scale.recipe.data import DataSection

THREADS = min(8, len(os.sched_getaffinity(0)))
Entry = RawSample | BadSample
Read = Callable[[int, int], Iterator[Entry]]


class Place(NamedTuple):
    """Which picture of an input: the same in every call with the same inputs."""

    part: int
    number: int


@dataclass(frozen=True)
class Part:
    """Pictures that are read one after the other: a shard, a folder, a table.

    Attributes:
        name: of the input.
        read: every `stride`-th one from `index` on.
        count: how many there are, None if nobody knows.
        is_shard: whether it is a shard.
    """

    name: str
    read: Read
    count: int | None
    is_shard: bool = False


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Attributes:
        place: in the inputs.
        key: its name.
        pixels: uint8 [3, H, W].
        captions: that came with it, the main one first.
        targets: of them, those that a model learns to write, where these are others.
    """

    place: Place
    key: str
    pixels: Tensor
    captions: tuple[str, ...]
    targets: tuple[str, ...] | None = None


@dataclass(frozen=True)
class BadPicture:
    """One that cannot be used, or the unreadable rest of a shard.

    Attributes:
        place: in the inputs.
        cause: why, as counted.
        lost: pictures that this costs.
    """

    place: Place
    cause: str
    lost: int


class PictureSource(Protocol):
    """Pictures of an evaluation.

    Attributes:
        name: as messages call them.
        count: how many there are, unusable ones included; None if nobody knows.
    """

    @property
    def name(self) -> str: ...

    @property
    def count(self) -> int | None: ...

    def entries(
        self, model: ModelConfig, rank: int, ranks: int, strided: bool
    ) -> Iterator[Picture | BadPicture]:
        """A rank's share, in the order of places.

        Args:
            model: whose image size and resizing.
            rank: whose share.
            ranks: how many share them.
            strided: deal pictures in turn, so that ranks are equally far.

        Raises:
            DataError: inputs that cannot be read.
        """
        ...


@dataclass(frozen=True)
class InputPictures:
    """Pictures with captions, as `open_pictures` found them."""

    parts: Sequence[Part]
    name: str = "the data"

    @property
    def count(self) -> int | None:
        """How many there are, None if nobody knows."""
        return count_pictures(self.parts)

    def entries(
        self, model: ModelConfig, rank: int, ranks: int, strided: bool
    ) -> Iterator[Picture | BadPicture]:
        """As of `PictureSource`."""
        shares = _entries(self.parts, rank, ranks, frozenset(), strided)
        return _decoded(shares, model, captions_needed=True)


def open_pictures(
    inputs: Sequence[str], data: DataSection, options: ListOptions, captions_needed: bool = False
) -> list[Part]:
    """Inputs in parts; picture files next to each other are one part.

    Args:
        inputs: picture files, folders of pictures or shards, .csv/.tsv tables, COCO or Karpathy
            .json files, shards (paths, braces, urls, pipe:), synthetic://.
        data: captions of shards, how remote shards are read.
        options: how tables and annotation files are read.
        captions_needed: whether a table must have a column with captions, and what is wrong with
            the captions of a shard is a fault of the sample.

    Raises:
        DataError: an input that names nothing.
    """
    parts: list[Part] = []
    for are_files, names in itertools.groupby(inputs, _is_file):
        if are_files:
            listing = Listing([ListedPicture(Path(name)) for name in names])
            parts.append(listed_part(listing, "pictures"))
        else:
            for name in names:
                parts += _open(name, data, options, captions_needed)
    return parts


def count_pictures(parts: Sequence[Part]) -> int | None:
    """How many there are, None if nobody knows."""
    known = [part.count for part in parts if part.count is not None]
    return sum(known) if len(known) == len(parts) else None


def is_picture_folder(path: Path) -> bool:
    """Whether it is a folder, and not one of shards."""
    return path.is_dir() and not any(path.glob("*.tar"))


def read_pictures(
    parts: Sequence[Part],
    model: ModelConfig,
    bad: Counter[str],
    *,
    rank: int = 0,
    ranks: int = 1,
    done: frozenset[Place] = frozenset(),
) -> Iterator[Picture]:
    """A rank's pictures in order, decoded by threads; unusable ones are counted in `bad`.

    With at least as many parts as ranks each rank reads parts of its own, so that no shard is read
    twice. `done` are left out.
    """
    for entry in _decoded(_entries(parts, rank, ranks, done), model, captions_needed=False):
        if isinstance(entry, Picture):
            yield entry
        else:
            bad[entry.cause] += entry.lost


def first_pictures(
    source: Source, model: ModelConfig, most: int, rank: int, ranks: int
) -> list[Picture | BadPicture]:
    """A rank's share of the first `most` samples of a source.

    Raises:
        DataError: it cannot be read.
    """
    share = len(range(rank, most, ranks))
    raws = itertools.islice(source.ordered(rank, ranks), share)
    places = (Place(0, number) for number in itertools.count(rank, ranks))
    shares = zip(places, raws, strict=False)
    return [_decode(place, raw, model, captions_needed=True) for place, raw in shares]


def _decoded(
    shares: Iterator[tuple[Place, Entry]], model: ModelConfig, captions_needed: bool
) -> Iterator[Picture | BadPicture]:
    """In order, by threads that decode a little ahead."""
    with ThreadPoolExecutor(THREADS) as pool:
        pending: deque[Future[Picture | BadPicture]] = deque()
        for place, raw in shares:
            pending.append(pool.submit(_decode, place, raw, model, captions_needed))
            if len(pending) > 8 * THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _entries(
    parts: Sequence[Part],
    rank: int,
    ranks: int,
    done: frozenset[Place],
    strided: bool = False,
) -> Iterator[tuple[Place, Entry]]:
    whole = len(parts) >= ranks and not strided
    first, stride = (0, 1) if whole else (rank, ranks)
    for number, part in enumerate(parts):
        if whole and number % ranks != rank:
            continue
        places = (Place(number, n) for n in itertools.count(first, stride))
        for place, raw in zip(places, part.read(first, stride), strict=False):
            if place not in done:
                yield place, raw


def _decode(
    place: Place, raw: Entry, model: ModelConfig, captions_needed: bool
) -> Picture | BadPicture:
    try:
        if isinstance(raw, BadSample):
            raise raw
        if captions_needed and not (raw.captions and raw.targets != ()):
            raise BadSample("missing_caption", raw.key, raw.shard)
        image = decode_image(raw.image, raw.key)
        pixels = eval_pixels(image, model.vision_cfg.image_size, model.preprocess_cfg)
    except BadSample as bad:
        return BadPicture(place, bad.cause, bad.skipped.lost)
    captions = tuple(caption for caption, _ in raw.captions)
    targets = None if raw.targets is None else tuple(caption for caption, _ in raw.targets)
    return Picture(place, raw.key, pixels, captions, targets)


def _is_file(name: str) -> bool:
    path = Path(name)
    if not is_local(name) or not is_picture(path) or path.is_dir():
        return False
    if not path.is_file():
        raise DataError(f"{name}: no such file")
    return True


def _open(
    name: str, data: DataSection, options: ListOptions, captions_needed: bool
) -> Iterator[Part]:
    path = Path(name)
    if name.startswith("synthetic://"):
        shapes = Shapes.from_url(name)
        yield Part(name, IndexedSource(shapes, name, 0).ordered, len(shapes))
    elif is_local(name) and (_is_list(path) or is_picture_folder(path)):
        yield listed_part(list_pictures(path, options, captions_needed), name)
    else:
        yield from _shards(name, data, captions_needed)


def _is_list(path: Path) -> bool:
    return is_table(path) or is_annotation_file(path)


def listed_part(listing: Listing, name: str) -> Part:
    """Picture files as one part."""
    files = PictureFiles(listing)
    return Part(name, IndexedSource(files, name, 0).ordered, len(files))


def _shards(name: str, data: DataSection, captions_needed: bool) -> Iterator[Part]:
    storage = storage_options(data)
    urls = list(expand_shards(name, storage))
    if missing := missing_shards(urls):
        raise DataError(f"{missing[0]}: no such file or folder")
    rules = SampleRules(data.captions, data.filters, captions_needed, every_caption=True)

    def reader(url: str) -> Read:
        def read(index: int, stride: int) -> Iterator[Entry]:
            return itertools.islice(read_shard(url, rules, storage), index, None, stride)

        return read

    yield from (Part(url, reader(url), None, is_shard=True) for url in urls)
