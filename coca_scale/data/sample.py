"""Raw samples and what can be wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from PIL import Image


class DataError(ValueError):
    """Data that a run cannot use at all; the message says what and where."""


class BadSample(Exception):
    """One unusable sample: skipped and counted by `cause`."""

    def __init__(self, cause: str, key: str) -> None:
        super().__init__(f"{key}: {cause}")
        self.cause = cause
        self.key = key


@dataclass(frozen=True)
class RawSample:
    """An image, encoded or already drawn, with its caption."""

    key: str
    image: bytes | Image.Image
    caption: str


class Position(NamedTuple):
    """How far a lane has read: all parts before `part`, and `offset` samples of that part."""

    epoch: int = 0
    part: int = 0
    offset: int = 0


class Source(Protocol):
    """Where raw samples come from."""

    def check(self) -> None:
        """Raise DataError for whatever can be seen to be missing without reading samples."""
        ...

    def count(self) -> int | None:
        """Samples per epoch, None where nobody knows."""
        ...

    def lane(
        self, lane: int, lanes: int, start: Position
    ) -> Iterator[tuple[Position, RawSample | BadSample]]:
        """The rest of one epoch of a lane, each sample with the position that follows it."""
        ...

    def ordered(self, index: int, stride: int) -> Iterator[RawSample | BadSample]:
        """Every `stride`-th sample from `index` on, in storage order, once."""
        ...
