"""PNG files of any declared size, made row by row."""

from __future__ import annotations

import zlib

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def chunk(kind, content):
    """A chunk of a PNG."""
    crc = zlib.crc32(kind + content).to_bytes(4, "big")
    return len(content).to_bytes(4, "big") + kind + content + crc


def black_png(width, height, extra=b"", channels=0):
    """A black picture, or with 4 `channels` a transparent one; `extra` chunks stand behind it."""
    bits, colour = (8, 6) if channels == 4 else (1, 0)
    row = bytes(1 + (width * bits * max(1, channels) + 7) // 8)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    header = chunk(b"IHDR", size + bytes([bits, colour, 0, 0, 0]))
    return PNG_MAGIC + header + chunk(b"IDAT", data) + extra + chunk(b"IEND", b"")
