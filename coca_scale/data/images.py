"""Image bytes to uint8 tensors: decoding, colour, cropping."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from coca_scale.data.sample import BadSample

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# by content, whatever the name says; others can start programs (EPS) or are no pictures
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MIN_SIDE_PIXELS = 2
MAX_PIXELS = 2**27
ASPECT_RANGE = (3 / 4, 4 / 3)


@contextmanager
def _opened(data: bytes | Image.Image, key: str) -> Iterator[Image.Image]:
    """A picture of usable size, not yet decoded; what goes wrong inside becomes a BadSample."""
    if isinstance(data, Image.Image):
        yield data
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata; size is checked below
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if min(image.size) < MIN_SIDE_PIXELS:
                    raise BadSample("tiny_image", key)
                if image.width * image.height > MAX_PIXELS:
                    raise BadSample("huge_image", key)
                yield image
    except Image.DecompressionBombError as error:
        raise BadSample("huge_image", key) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        # SyntaxError and ValueError are what PIL's PNG and TIFF readers raise on broken files
        raise BadSample("broken_image", key) from error


def decode_image(data: bytes | Image.Image, key: str) -> Image.Image:
    """Decode to RGB: transparent parts become white, 16-bit grey keeps its range.

    Raises:
        BadSample: broken_image, tiny_image (1 pixel wide or high) or huge_image (over 2^27 pixels).
    """
    with _opened(data, key) as image:
        image.load()
        return to_rgb(image)


@dataclass(frozen=True)
class TrainCrop:
    """How training pictures are cropped.

    Attributes:
        size: pixels per side of the result.
        scale_min: smallest share of the area; 1 takes the centre crop.
        min_side: shortest side of pictures that are used, in pixels.
        max_aspect_ratio: longest over shortest side of pictures that are used.
    """

    size: int
    scale_min: float
    min_side: int | None = None
    max_aspect_ratio: float | None = None

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
            return eval_pixels(to_rgb(image), size)
        full_width, full_height = image.size
        left, top, width, height = _random_crop(full_width, full_height, crop.scale_min, rng)
        scale = 1.0
        if isinstance(image, JpegImageFile):
            spare = min(width, height) / size
            drafted = image.draft(None, (int(full_width / spare), int(full_height / spare)))
            scale = drafted[1][2] / full_width if drafted is not None else 1.0
        box = (left * scale, top * scale, (left + width) * scale, (top + height) * scale)
        resized = to_rgb(image).resize((size, size), Image.Resampling.BICUBIC, box=box)
        return _to_tensor(resized)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode as RGB."""
    if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion would clip it to white
        values = np.array(image, dtype=np.float32)
        if values.max(initial=0) > 255:
            values /= 257
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def eval_pixels(image: Image.Image, size: int) -> Tensor:
    """Shortest side to `size` (bicubic), centre crop, as OpenCLIP: uint8 [3, size, size]."""
    if image.size != (size, size):
        short = min(image.size)
        width, height = (int(size * side / short) for side in image.size)  # as torchvision
        left, top = round((width - size) / 2), round((height - size) / 2)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
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
