"""Readers of files that others wrote, each with small real ones to begin with."""

from __future__ import annotations

import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from coca_scale.data.images import FORMATS, TrainCrop, decode_image, eval_pixels, train_pixels
from coca_scale.data.listing import ListOptions, list_pictures
from coca_scale.data.rules import SampleRules
from coca_scale.data.sample import BadSample, Position, RawSample
from coca_scale.data.shards import read_shard
from coca_scale.data.sources import open_source
from coca_scale.data.storage import StorageOptions
from coca_scale.data.tables import read_table
from coca_scale.evaluation.zeroshot import make_classes
from coca_scale.openclip.weight_files import read_weight_file
from coca_scale.recipe.load import load_recipe
from tests.conftest import tiny_recipe
from tests.data.pngs import PNG_MAGIC, black_png, chunk
from tests.fuzz import Reader

RECIPES = Path(__file__).parents[1] / "recipes"
RULES = SampleRules({}, tiny_recipe().data.filters)
NO_RETRIES = StorageOptions(0)


def _encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pictures() -> list[bytes]:
    """Every format that is opened, in the modes it has, with metadata."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    found = [black_png(24, 20, chunk(b"eXIf", exif.tobytes()[6:])), black_png(9, 9, channels=4)]
    deep = [Image.fromarray(noise[..., 0].astype(kind)) for kind in (np.uint16, np.int32)]
    deep.append(Image.fromarray(noise[..., 0].astype(np.float32)))
    modes = [image.convert(mode) for mode in ("1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "LAB")]
    for form in FORMATS:
        for picture in (image, *modes, *deep):
            try:
                found.append(_encoded(picture, form, exif=exif))
            except (OSError, ValueError, KeyError):
                continue  # the format has no such mode
    animation = {"save_all": True, "append_images": [image.rotate(90)]}
    found += [_encoded(image, form, **animation) for form in ("GIF", "WEBP", "PNG", "MPO")]
    found.append(_encoded(image, "JPEG", progressive=True))
    for packing in ("tiff_deflate", "tiff_lzw", "packbits", "jpeg"):
        found.append(_encoded(image, "TIFF", compression=packing))
    found.append(_encoded(modes[0], "TIFF", compression="group4"))
    return found


def mend_png(data: bytearray) -> None:
    """Checksums of all chunks."""
    if not data.startswith(PNG_MAGIC):
        return
    begin = len(PNG_MAGIC)
    while begin + 12 <= len(data):
        end = begin + 8 + int.from_bytes(data[begin : begin + 4], "big")
        if end + 4 > len(data):
            return
        data[end : end + 4] = zlib.crc32(data[begin + 4 : end]).to_bytes(4, "big")
        begin = end + 4


def _read_picture(path: Path) -> None:
    data = path.read_bytes()
    for crop in (TrainCrop(32, 0.5), TrainCrop(32, 1.0)):
        try:
            train_pixels(data, "k", crop, np.random.default_rng(0))
        except BadSample:
            continue
    eval_pixels(decode_image(data, "k"), 32)


def tars() -> list[bytes]:
    """What tools write: pax and GNU headers, long names, links, folders, sparse files."""
    picture = _encoded(Image.new("RGB", (4, 4)), "JPEG")
    found = []
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            for name in ("a.jpg", "a.txt", "b/ü.jpg", "b/ü.txt", "b/ü.json"):
                about = tarfile.TarInfo(name)
                content = picture if name.endswith("jpg") else b'{"caption": "words"}'
                about.size = len(content)
                if form == tarfile.PAX_FORMAT:
                    about.pax_headers = {"size": str(len(content)), "comment": "x"}
                tar.addfile(about, io.BytesIO(content))
            if form != tarfile.USTAR_FORMAT:
                long = tarfile.TarInfo(f"{'long/' * 40}c.jpg")
                long.type, long.linkname = tarfile.SYMTYPE, "to/" * 60
                tar.addfile(long)
            for kind in (tarfile.DIRTYPE, tarfile.LNKTYPE):
                other = tarfile.TarInfo(f"d{kind[0]}")
                other.type = kind
                tar.addfile(other)
        found.append(buffer.getvalue()[:-8192])
    return [*found, found[0] + found[1]]


def mend_tar(data: bytearray) -> None:
    """Checksums of all headers."""
    for begin in range(0, len(data) - 511, 512):
        if data[begin + 257 : begin + 262] == b"ustar":
            data[begin + 148 : begin + 156] = b" " * 8
            data[begin + 148 : begin + 156] = b"%06o\0 " % sum(data[begin : begin + 512])


def _read_tar(path: Path) -> None:
    for entry in read_shard(str(path), RULES, NO_RETRIES):
        assert isinstance(entry, RawSample | BadSample)
    source = open_source(str(path), tiny_recipe().data, 0)
    for position, _ in source.lane(0, 1, Position()):
        assert position.byte < 2**63


def tables() -> list[bytes]:
    """CSV and TSV with quotes and more columns than needed."""
    return [
        b'filepath,title\na.jpg,"one, two"\nb.jpg,three\n',
        b'filepath\ttitle\tsource\na.jpg\tone\tx\nb.jpg\t"two\ty\n',
        "filepath,title\r\nü.jpg,日本\r\n".encode("utf-8-sig"),
    ]


def _read_table(path: Path) -> None:
    read_table(path, "filepath", "title")


def side_cars() -> list[bytes]:
    """Captions as people write them."""
    return [b"a dog\nein Hund\n", "\ufeffkurz".encode(), "日本".encode("utf-16")]


def _read_side_car(path: Path) -> None:
    path.with_suffix(".jpg").touch()
    list_pictures(path.parent, ListOptions())


def recipes() -> list[bytes]:
    """The shipped ones."""
    return [path.read_bytes() for path in sorted(RECIPES.glob("*.yaml"))]


def _weights() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.ones(4, 4), "b": torch.zeros(16, dtype=torch.bfloat16)}


def safetensors() -> list[bytes]:
    """A small file of weights."""
    return [save(_weights())]


def class_names() -> list[bytes]:
    """A name per line."""
    return [b"dog\ncat\n", "Hündchen\r\n\r\n猫".encode("utf-8-sig")]


def _read_class_names(path: Path) -> None:
    make_classes(str(path), "simple", None)


READERS = {
    "pictures": Reader(pictures, _read_picture, "x.jpg", mend_png),
    "tar": Reader(tars, _read_tar, "x.tar", mend_tar),
    "tables": Reader(tables, _read_table, "x.csv"),
    "side_cars": Reader(side_cars, _read_side_car, "x.txt"),
    "class_names": Reader(class_names, _read_class_names, "x.txt"),
    "recipes": Reader(recipes, load_recipe, "x.yaml"),
    "safetensors": Reader(safetensors, read_weight_file, "x.safetensors"),
}
