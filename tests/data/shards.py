"""Small shards in tar files, and the pictures in them."""

from __future__ import annotations

import io

from PIL import Image
from webdataset import TarWriter


def encoded(colour=(200, 30, 30), mode="RGB", size=(24, 24), form="JPEG"):
    """The bytes of a picture of one colour."""
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, form)
    return buffer.getvalue()


def write_shards(folder, counts):
    """Shards with as many samples as told, each with a key of its own; the pattern they match."""
    picture = encoded()
    for number, count in enumerate(counts):
        with TarWriter(str(folder / f"{number:03d}.tar")) as writer:
            for i in range(count):
                caption = f"picture {number} {i}"
                writer.write({"__key__": f"{number}_{i}", "jpg": picture, "txt": caption})
    return str(folder / f"{{000..{len(counts) - 1:03d}}}.tar")
