"""Raw samples and what can be wrong with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from PIL import Image

from coca_scale.errors import UserError
from coca_scale.recipe.text import one_line, visible

MAX_CAPTION_CHARACTERS = 4096  # merging a "word" of n letters takes CLIP's BPE n² steps
MAX_CAPTIONS = 1000  # a MiB of text has half a million lines, which a shuffle window cannot hold

EXTENSION = "wrong_extension"
NOT_ADJACENT, COMPRESSED = "files_not_adjacent", "compressed_shard"
FORMAT, OTHER_ENCODING, LINKED_FOLDER = "format_", "caption_not_", "linked_folder"
REMEDIES = {
    NOT_ADJACENT: "files of a sample stand next to each other after tar --sort=name",
    COMPRESSED: "shards are plain tar files: decompress it, or read it by pipe:gzip -dc FILE",
    FORMAT: "pictures in formats that are not opened are converted first",
    OTHER_ENCODING: "--encoding says what side-cars and lists are in if not UTF-8",
    EXTENSION: "the name of a sample ends at its first dot, and the rest is the extension",
    LINKED_FOLDER: "links to folders are not followed",
}  # by how a cause begins


class DataError(UserError):
    """Data that a run cannot use at all; the message says what and where."""


class Skipped(NamedTuple):
    """A sample that was left out, or a shard's unreadable rest.

    Attributes:
        cause: why, as counted.
        key: name of the sample, or of the shard where that is what broke.
        shard: url of the shard, empty outside shards.
        lost: samples that this costs; more than 1 only for shards whose size is known.
        filtered: left out because the recipe says so, which is no fault of the data.
    """

    cause: str
    key: str
    shard: str = ""
    lost: int = 1
    filtered: bool = False


def causes_text(causes: Counter[str]) -> str:
    """`2 × broken_image, 1 × empty_caption`, the most frequent first; then what mends them."""
    counts = ", ".join(f"{count} × {cause}" for cause, count in causes.most_common())
    remedies = dict.fromkeys(remedy for cause in causes if (remedy := remedy_of(cause)))
    return "; ".join([counts, *remedies])


def remedy_of(cause: str) -> str | None:
    """What to do about a cause, where that is the same for all data."""
    return next((words for begin, words in REMEDIES.items() if cause.startswith(begin)), None)


class BadSample(Exception):
    """One unusable sample; takes the fields of `Skipped`."""

    def __init__(
        self, cause: str, key: str, shard: str = "", lost: int = 1, filtered: bool = False
    ) -> None:
        super().__init__(f"{key}: {cause}")
        self.skipped = Skipped(cause, key, shard, lost, filtered)

    @property
    def cause(self) -> str:
        """Why it cannot be used."""
        return self.skipped.cause


@dataclass(frozen=True)
class RawSample:
    """An image, encoded or already drawn, with its captions.

    Whatever a reader found, here it becomes text that can be tokenised, written and shown: a line
    per caption without controls and escapes, cut to 4,096 characters, and of many captions the
    first 1,000; what is empty then is left out.

    Attributes:
        key: name of the sample.
        image: file content, or a picture.
        captions: texts with their sampling weights, the main one first; may be empty.
        targets: likewise those that a model learns to write; None: the one that is drawn of
            `captions`.
        shard: url of the shard, empty outside shards.
    """

    key: str
    image: bytes | Image.Image
    captions: tuple[tuple[str, float], ...] = ()
    shard: str = ""
    targets: tuple[tuple[str, float], ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "captions", _usable(self.captions))
        if self.targets is not None:
            object.__setattr__(self, "targets", _usable(self.targets))
        object.__setattr__(self, "key", visible(self.key))

    @property
    def caption(self) -> str:
        """The main caption, empty if there is none."""
        return self.captions[0][0] if self.captions else ""


def _usable(captions: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float], ...]:
    few = captions[:MAX_CAPTIONS]
    lines = ((one_line(text)[:MAX_CAPTION_CHARACTERS], weight) for text, weight in few)
    return tuple((line, weight) for line, weight in lines if line)


class Position(NamedTuple):
    """How far a lane has read.

    The current shuffle window starts at sample `number`, byte `byte`, of part `part` of the
    lane's epoch, and `used` samples of it have been given out.
    """

    epoch: int = 0
    part: int = 0
    number: int = 0
    byte: int = 0
    used: int = 0


class Source(Protocol):
    """Where raw samples come from."""

    def check(self) -> None:
        """Raise DataError for whatever can be seen to be missing without reading samples."""
        ...

    def count(self) -> int | None:
        """Samples per epoch, None where nobody knows."""
        ...

    def identity(self) -> str:
        """What makes it the same data, wherever it lies; a position means nothing in others."""
        ...

    def lane(
        self, lane: int, lanes: int, start: Position
    ) -> Iterator[tuple[Position, RawSample | BadSample]]:
        """The rest of one epoch of a lane, each sample with the position that follows it."""
        ...

    def ordered(self, index: int, stride: int) -> Iterator[RawSample | BadSample]:
        """Every `stride`-th sample from `index` on, in storage order, once."""
        ...
