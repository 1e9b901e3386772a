"""Image bytes to uint8 tensors: decoding, colour, orientation, cropping."""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import ExifTags, Image, features
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    IMAGELENGTH,
    IMAGEWIDTH,
    PHOTOMETRIC_INTERPRETATION,
    TILELENGTH,
    TILEWIDTH,
)
from torch import Tensor

from coca_scale.data.image_headers import has_too_many_pieces
from coca_scale.data.sample import BadSample
from coca_scale.model.preprocess import OPENAI, Preprocess

# what is opened, by content whatever the name says, and how such files are called; of others, some
# can start programs (EPS) or are no pictures
EXTENSIONS_OF = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif", "mpo"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "GIF": ("gif",),
    "BMP": ("bmp", "dib"),
    "TIFF": ("tif", "tiff"),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
    **({"JPEG2000": ("jp2", "j2k", "jpx", "jpf")} if features.check("jpg_2000") else {}),
    **({"AVIF": ("avif",)} if features.check("avif") else {}),  # in Pillow from 11.3 on
}
FORMATS = tuple(EXTENSIONS_OF)
IMAGE_EXTENSIONS = tuple(e for extensions in EXTENSIONS_OF.values() for e in extensions)
MIN_SIDE_PIXELS = 2
MAX_PIXELS = 2**27
MAX_COPIED_PIXELS = 2**26
MAX_ASPECT = 128  # with its short side at 1024 pixels such a picture has MAX_PIXELS
MAX_SCANS = 200  # of a JPEG; progressive ones have about 10
ASPECT_RANGE = (3 / 4, 4 / 3)
# what PIL raises on broken files (the last is AVIF's decoder), and on broken EXIF
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, RuntimeError)
_BROKEN_EXIF = (*_BROKEN, TypeError, LookupError, ArithmeticError, struct.error)
_SOI, _EOI, _SOS = b"\xff\xd8", b"\xff\xd9", b"\xff\xda"
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]", re.DOTALL)  # of those with a length, or EOI
_ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
_STRIP_PIXELS = 2**20
_WHITE_IS_ZERO = 0
_COPYING = ("WEBP", "AVIF", "JPEG2000")  # their decoders take 9 to 20 bytes a pixel, others 4
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF's orientation
_SIDEWAYS = (5, 6, 7, 8)
_SAYS_ORIENTATION = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


@contextmanager
def _opened(data: bytes | Image.Image, key: str) -> Iterator[Image.Image]:
    """A picture of usable size, not yet decoded; what goes wrong inside becomes a BadSample."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata; size is checked below
            if isinstance(data, Image.Image):
                _check_size(data, key)
                yield data
                return
            if has_too_many_pieces(data):
                raise BadSample("too_many_pieces", key)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(image, key)
                if image.format == "TIFF" and _tiled_pixels(image, data) > MAX_PIXELS:
                    raise BadSample("huge_image", key)
                if image.format in ("JPEG", "MPO") and _count_scans(data) > MAX_SCANS:
                    raise BadSample("too_many_scans", key)  # each goes over the whole picture
                yield image
    except Image.DecompressionBombError as error:
        raise BadSample("huge_image", key) from error
    except _BROKEN as error:
        raise BadSample("broken_image", key) from error


def _check_size(image: Image.Image, key: str) -> None:
    short, long = min(image.size), max(image.size)
    if short < MIN_SIDE_PIXELS:
        raise BadSample("tiny_image", key)
    if short * long > (MAX_COPIED_PIXELS if image.format in _COPYING else MAX_PIXELS):
        raise BadSample("huge_image", key)
    if long > MAX_ASPECT * short:
        raise BadSample("extreme_aspect", key)


def _tiled_pixels(image: Image.Image, data: bytes) -> int:
    """Pixels of all tiles of a TIFF, which are decoded whole however small the picture is.

    Raises:
        ValueError: it has tiles of a size that Pillow does not understand, and libtiff might.
    """
    if not _tiff_tags(data) & {TILEWIDTH, TILELENGTH}:
        return 0
    tags = getattr(image, "tag_v2", {})
    pixels = 1
    for whole, part in ((IMAGEWIDTH, TILEWIDTH), (IMAGELENGTH, TILELENGTH)):
        length, side = tags.get(whole), tags.get(part)
        if not isinstance(length, int) or not isinstance(side, int) or side < 1:
            raise ValueError(f"tag {part} is {side!r}")
        pixels *= -(-length // side) * side
    return pixels


def _tiff_tags(data: bytes) -> set[int]:
    """Tags of the first picture of a TIFF, those too whose types Pillow does not know.

    Raises:
        ValueError: cut short.
    """
    order = "<" if data[:2] == b"II" else ">"
    try:
        is_big = struct.unpack_from(f"{order}H", data, 2) == (43,)
        where, number, size = (8, "Q", 20) if is_big else (4, "H", 12)
        (start,) = struct.unpack_from(f"{order}{'Q' if is_big else 'I'}", data, where)
        (count,) = struct.unpack_from(f"{order}{number}", data, start)
        entries = data[start + struct.calcsize(number) :][: count * size]
    except struct.error as error:
        raise ValueError(str(error)) from error
    tags = (entries[place : place + 2] for place in range(0, len(entries), size))
    return {int.from_bytes(tag, "little" if order == "<" else "big") for tag in tags}


def _count_scans(jpeg: bytes) -> int:
    """Scans of the picture alone, not of a thumbnail before or a film behind it."""
    scans, position = 0, len(_SOI)
    while (found := _MARKER.search(jpeg, position)) is not None and found[0] != _EOI:
        scans += found[0] == _SOS
        position = found.end() + int.from_bytes(jpeg[found.end() : found.end() + 2], "big")
    return scans


def decode_image(data: bytes | Image.Image, key: str) -> Image.Image:
    """Decode to RGB, upright as EXIF says; transparent parts become white.

    More than 8 bits a channel are scaled: white of integers is 255 where none is larger, else
    65535, or 4095 in a TIFF of 12 bits; white of floats is the first of 1, 255 and 65535 that none
    exceeds.

    Raises:
        BadSample: broken_image, tiny_image (1 pixel wide or high), huge_image (over 2^27 pixels;
            2^26 in WebP, AVIF and JPEG 2000), extreme_aspect (a side over 128 times the other),
            too_many_scans (a JPEG with over 200), too_many_pieces (before its pixels, or in
            digits), or unknown_pixels (values below 0, above 65535 or not finite; CIELAB).
    """
    with _opened(data, key) as image:
        return _upright(image, key)


def image_format(data: bytes, key: str) -> str:
    """PIL's name of the format: of FORMATS, or MPO, a JPEG with further pictures behind it.

    Raises:
        BadSample: as decode_image.
    """
    with _opened(data, key) as image:
        assert image.format is not None
        return image.format


@dataclass(frozen=True)
class TrainCrop:
    """How training pictures are cropped.

    Attributes:
        size: pixels per side of the result.
        scale_min: smallest share of the area; 1 takes the centre crop.
        min_side: shortest side of pictures that are used, in pixels.
        max_aspect_ratio: longest over shortest side of pictures that are used.
        preprocess: of the model, for the centre crop.
    """

    size: int
    scale_min: float
    min_side: int | None = None
    max_aspect_ratio: float | None = None
    preprocess: Preprocess = OPENAI

    def check(self, size: tuple[int, int], key: str) -> None:
        """Raises BadSample for a picture that the recipe leaves out."""
        short, long = min(size), max(size)
        if self.min_side is not None and short < self.min_side:
            raise BadSample("filtered_min_side", key, filtered=True)
        if self.max_aspect_ratio is not None and long > short * self.max_aspect_ratio:
            raise BadSample("filtered_aspect_ratio", key, filtered=True)


def train_pixels(
    data: bytes | Image.Image, key: str, crop: TrainCrop, rng: np.random.Generator
) -> Tensor:
    """Random crop of at least `crop.scale_min` of the area: uint8 [3, size, size].

    Crops are drawn as torchvision's RandomResizedCrop draws them, from `rng`. A JPEG is decoded at
    the smallest of libjpeg's scales (1/2, 1/4, 1/8) at which the crop still has `size` pixels.

    Raises:
        BadSample: as decode_image, or filtered out.
    """
    size = crop.size
    with _opened(data, key) as image:
        crop.check(image.size, key)
        if crop.scale_min == 1.0:
            return eval_pixels(_upright(image, key), size, crop.preprocess)
        if not isinstance(image, JpegImageFile):
            image.load()  # in a PNG the orientation may stand behind the pixels
        stored = image.size
        full_width, full_height = stored[::-1] if _orientation(image) in _SIDEWAYS else stored
        left, top, width, height = _random_crop(full_width, full_height, crop.scale_min, rng)
        scale = 1.0
        if isinstance(image, JpegImageFile):
            spare = min(width, height) / size
            drafted = image.draft(None, (int(stored[0] / spare), int(stored[1] / spare)))
            scale = drafted[1][2] / stored[0] if drafted is not None else 1.0
        box = (left * scale, top * scale, (left + width) * scale, (top + height) * scale)
        resized = _upright(image, key).resize((size, size), Image.Resampling.BICUBIC, box=box)
        return _to_tensor(resized)


def _upright(image: Image.Image, key: str) -> Image.Image:
    """The decoded picture as RGB, turned as its orientation says."""
    image.load()
    turn = _TURNS.get(_orientation(image))
    rgb = _to_rgb(image, key)
    if turn is None:
        return rgb
    turned = rgb.transpose(turn)
    for name in _SAYS_ORIENTATION:
        turned.info.pop(name, None)
    return turned


def _orientation(image: Image.Image) -> int:
    """1 to 8, and 1 where nothing readable says so."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except _BROKEN_EXIF:
        return 1
    return found if isinstance(found, int) and found in _TURNS else 1


def _to_rgb(image: Image.Image, key: str) -> Image.Image:
    """Any PIL mode as RGB; in strips where a whole copy of 4 bytes a pixel would come on top."""
    convert: Callable[[Image.Image], Image.Image]
    if image.mode == "LAB":
        raise BadSample("unknown_pixels", key)
    if image.mode.startswith(("I", "F")):
        convert = _scaling(image, key)
    elif image.mode in _ALPHA_MODES or "transparency" in image.info:
        convert = _on_white
    else:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgb = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        rgb.paste(convert(strip), (0, top))
    return rgb


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Pieces as wide as the picture, with the row each begins at."""
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _scaling(image: Image.Image, key: str) -> Callable[[Image.Image], Image.Image]:
    """What makes 8 bits of the strips of a picture with 12, 16 or 32 bits a pixel."""
    limits = [(v.min(), v.max()) for v in (np.asarray(strip) for _, strip in _strips(image))]
    smallest, largest = np.min(limits), np.max(limits)  # not a number if any pixel is not
    tags = getattr(image, "tag_v2", {})
    whites = [1, 255, 65535] if image.mode.startswith("F") else [255, 65535]
    if tags.get(BITSPERSAMPLE) == (12,):
        whites = [4095]
    white = next((white for white in whites if largest <= white), None)
    if white is None or not smallest >= 0:
        raise BadSample("unknown_pixels", key)
    inverted = tags.get(PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO
    transparent = image.info.get("transparency")

    def convert(strip: Image.Image) -> Image.Image:
        values = np.array(strip, dtype=np.float32)
        scaled = (values / (white / 255)).round()
        scaled = 255 - scaled if inverted else scaled
        if isinstance(transparent, int):  # a shade of grey in a PNG
            scaled[values == transparent] = 255
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")

    return convert


def eval_pixels(image: Image.Image, size: int, preprocess: Preprocess = OPENAI) -> Tensor:
    """A picture as evaluations see it, the same pixels as OpenCLIP's: uint8 [3, size, size].

    Args:
        image: in RGB.
        size: pixels per side.
        preprocess: resize mode, interpolation and fill colour; by default the shortest side becomes
            `size`, bicubically, and the centre is cut out.
    """
    if image.size == (size, size):
        return _to_tensor(image)
    bilinear = preprocess.interpolation == "bilinear"
    resampling = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
    if preprocess.resize_mode == "squash":
        image = image.resize((size, size), resampling)
    elif preprocess.resize_mode == "longest":
        ratio = max(image.size) / size
        width, height = (max(1, round(side / ratio)) for side in image.size)
        square = Image.new("RGB", (size, size), (preprocess.fill_color,) * 3)
        inside = ((size - width) // 2, (size - height) // 2)
        square.paste(image.resize((width, height), resampling), inside)
        image = square
    else:
        short = min(image.size)
        width, height = (int(size * side / short) for side in image.size)  # as torchvision
        left, top = round((width - size) / 2), round((height - size) / 2)
        resized = image.resize((width, height), resampling)
        image = resized.crop((left, top, left + size, top + size))
    return _to_tensor(image)


def _random_crop(
    width: int, height: int, scale_min: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    low, high = (math.log(ratio) for ratio in ASPECT_RANGE)
    for _ in range(10):
        area = width * height * rng.uniform(scale_min, 1.0)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(0, width - w + 1))
            return left, int(rng.integers(0, height - h + 1)), w, h
    aspect = min(max(width / height, ASPECT_RANGE[0]), ASPECT_RANGE[1])
    w = min(width, max(1, round(height * aspect)))
    h = min(height, max(1, round(width / aspect)))
    return (width - w) // 2, (height - h) // 2, w, h


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
