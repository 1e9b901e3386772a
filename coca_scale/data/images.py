"""Image bytes to uint8 tensors: decoding, colour, cropping."""

from __future__ import annotations

import io
import math
import warnings

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from coca_scale.data.sample import BadSample

MIN_SIDE_PIXELS = 2
MAX_PIXELS = 2**27
ASPECT_RANGE = (3 / 4, 4 / 3)


def decode_image(data: bytes | Image.Image, key: str) -> Image.Image:
    """Decode to RGB: transparent parts become white, 16-bit grey keeps its range.

    Raises:
        BadSample: broken_image, tiny_image (1 pixel wide or high) or huge_image (over 2^27 pixels).
    """
    if isinstance(data, Image.Image):
        return data
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata; size is checked below
            image = Image.open(io.BytesIO(data))
            if min(image.size) < MIN_SIDE_PIXELS:
                raise BadSample("tiny_image", key)
            if image.width * image.height > MAX_PIXELS:
                raise BadSample("huge_image", key)
            return to_rgb(image)
    except Image.DecompressionBombError as error:
        raise BadSample("huge_image", key) from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        # SyntaxError and ValueError are what PIL's PNG and TIFF readers raise on broken files
        raise BadSample("broken_image", key) from error


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
        resized = TF.resize(image, size, InterpolationMode.BICUBIC)
        image = TF.center_crop(resized, [size, size])
    return _to_tensor(image)


def train_pixels(
    image: Image.Image, size: int, scale_min: float, rng: np.random.Generator
) -> Tensor:
    """Random crop of at least `scale_min` of the area: uint8 [3, size, size].

    Crops are drawn as torchvision's RandomResizedCrop draws them, from `rng`.
    """
    if scale_min == 1.0:
        return eval_pixels(image, size)
    left, top, width, height = _random_crop(image.width, image.height, scale_min, rng)
    box = (left, top, left + width, top + height)
    return _to_tensor(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


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
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
