"""How many pieces a picture file has before its pixels: Pillow takes each by hand.

Markers of a JPEG, chunks of a PNG, blocks of a GIF, characters of a header in PNM: a file of some
megabytes can have millions, and would hold up a loader process for minutes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_PIECES = 10_000
MAX_PNM_HEADER_BYTES = 2**16
MAX_PLAIN_PIXELS = 2**23  # of a PNM whose pixels are written out in digits
_SMALLEST_CHUNK_BYTES = 1024  # on average, of a PNG with more than MAX_PIECES of them
_COMMENT = re.compile(rb"#[^\r\n]*")
_PLAIN = (b"P1", b"P2", b"P3")
_WITHOUT_WHITE = (b"P1", b"P4")  # two numbers, where others have three
_SOS, _EOI, _FILL = 0xDA, 0xD9, 0xFF
_ALONE = (0x00, 0x01, *range(0xD0, 0xD9))  # markers without a length
_EXTENSION, _IMAGE = 0x21, 0x2C


def has_too_many_pieces(data: bytes) -> bool:
    """Whether reading what stands before the pixels would take long."""
    if data.startswith(b"\xff\xd8"):
        return _more_than(MAX_PIECES, _markers(data))
    if data.startswith(b"\x89PNG"):
        return _more_than(MAX_PIECES + len(data) // _SMALLEST_CHUNK_BYTES, _chunks(data))
    if data.startswith(b"GIF8"):
        return _more_than(MAX_PIECES, _blocks(data))
    if data.startswith(b"P") and len(data) > MAX_PNM_HEADER_BYTES:
        return _pnm_is_long(data)
    return False


def _more_than(most: int, pieces: Iterator[None]) -> bool:
    return any(number == most for number, _ in enumerate(pieces))


def _markers(jpeg: bytes) -> Iterator[None]:
    """Of all that is before the first scan."""
    place = 2
    while place + 3 < len(jpeg) and jpeg[place] == _FILL:
        yield
        marker = jpeg[place + 1]
        if marker in (_SOS, _EOI):
            return
        if marker == _FILL:
            place += 1
        elif marker in _ALONE:
            place += 2
        else:
            place += 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")


def _chunks(png: bytes) -> Iterator[None]:
    place = 8
    while place < len(png):
        yield
        place += 12 + int.from_bytes(png[place : place + 4], "big")


def _blocks(gif: bytes) -> Iterator[None]:
    """Of all that is before the first picture."""
    place = 13 + (3 << (gif[10] & 7) + 1 if len(gif) > 10 and gif[10] & 0x80 else 0)
    while place < len(gif) and gif[place] != _IMAGE:
        yield
        if gif[place] != _EXTENSION:
            place += 1
            continue
        place += 2
        while place < len(gif) and gif[place]:
            yield
            place += 1 + gif[place]
        place += 1


def _pnm_is_long(pnm: bytes) -> bool:
    """Whether a PNM has a long header, or many pixels in digits."""
    words = _COMMENT.sub(b" ", pnm[:MAX_PNM_HEADER_BYTES]).split(None, 4)
    if len(words) < (3 if words[0] in _WITHOUT_WHITE else 4):
        return True
    sides = words[1:3]
    if words[0] not in _PLAIN or not all(s.isdigit() and len(s) < 10 for s in sides):
        return False  # Pillow looks at the sides
    return int(sides[0]) * int(sides[1]) > MAX_PLAIN_PIXELS
