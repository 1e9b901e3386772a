"""synthetic://shapes — pictures of coloured shapes with grammatical captions, drawn on the fly.

Options: `count` (samples per epoch, default 100000), `size` (pixels per side, default 64) and
`split` (train or val: other drawings of the same kinds of things). A drawing has a short caption,
`txt`, and a `long` one of three sentences, which says where the shape is and on what ground.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from urllib.parse import parse_qs, urlsplit

import numpy as np
from PIL import Image, ImageDraw

from coca_scale.data.rules import SENTENCES, TEXT, weighted
from coca_scale.data.sample import DataError, RawSample

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 208, 40),
    "purple": (138, 50, 168),
    "orange": (244, 132, 32),
    "black": (24, 24, 24),
    "white": (250, 250, 250),
}
SIZES = {"small": (0.15, 0.20), "large": (0.32, 0.40)}  # radius as a share of the picture's side
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SPLITS = ("train", "val")
OVERSAMPLE = 3
LONG = "long"
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
GROUNDS = ("red", "green", "blue")  # by the strongest of its three channels


class Shapes:
    """An indexed collection of drawings: the same index always gives the same picture."""

    def __init__(
        self,
        count: int,
        size: int,
        split: str,
        captions: Mapping[str, float] | None = None,
        targets: Mapping[str, float] | None = None,
    ) -> None:
        """`captions` and `targets` as of `from_url`."""
        self.size = size
        self.split = split
        self._count = count
        self._captions = captions or {TEXT: 1.0}
        self._targets = None if targets is None else targets or {TEXT: 1.0}

    @classmethod
    def from_url(
        cls,
        url: str,
        captions: Mapping[str, float] | None = None,
        targets: Mapping[str, float] | None = None,
    ) -> Shapes:
        """Parse synthetic://shapes?count=…&size=…&split=….

        Args:
            url: as above.
            captions: weights of `txt` and `long`, as of `SampleRules`; none is `txt`.
            targets: likewise of what a model learns to write; None: the same.

        Raises:
            DataError: unknown collection, option or name, or a value out of range.
        """
        for name in {*(captions or {}), *(targets or {})}:
            if name.removesuffix(SENTENCES) not in (TEXT, LONG):
                raise DataError(f"{url}: drawings have the captions txt and long, not {name!r}")
        try:
            parts = urlsplit(url)
        except ValueError as error:
            raise DataError(f"{url}: {error}") from error
        options = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        count, size = options.pop("count", "100000"), options.pop("size", "64")
        split = options.pop("split", "train")
        if parts.netloc != "shapes" or options:
            wrong = ", ".join(options) or parts.netloc
            raise DataError(f"{url}: {wrong} is not known; write synthetic://shapes?count=N")
        if not (count.isdecimal() and int(count) and size.isdecimal() and 16 <= int(size) <= 4096):
            raise DataError(f"{url}: count is at least 1, and size between 16 and 4096")
        if split not in SPLITS:
            raise DataError(f"{url}: split is train or val, not {split!r}")
        return cls(int(count), int(size), split, captions, targets)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> RawSample:
        rng = np.random.default_rng([SPLITS.index(self.split), index])
        size_name = str(rng.choice(list(SIZES)))
        colour_name = str(rng.choice(list(COLOURS)))
        shape = str(rng.choice(SHAPES))
        drawn = _draw(rng, self.size, SIZES[size_name], COLOURS[colour_name], shape)
        picture, place, ground = drawn
        short = f"a {size_name} {colour_name} {shape}"
        texts = {TEXT: short, LONG: f"{short}. it is at the {place}. the ground is {ground}."}
        captions, targets = (
            None if weights is None else weighted(weights, lambda name: [texts[name]])
            for weights in (self._captions, self._targets)
        )
        assert captions is not None
        key = f"shapes/{self.split}/{index:09d}"
        return RawSample(key, picture, captions, targets=targets)


def _draw(
    rng: np.random.Generator,
    size: int,
    radius_range: tuple[float, float],
    colour: tuple[int, int, int],
    shape: str,
) -> tuple[Image.Image, str, str]:
    """The picture, where the middle of the shape is in it, and the colour of its ground."""
    side = size * OVERSAMPLE
    background = rng.integers(120, 180, size=3)
    image = Image.new("RGB", (side, side), tuple(int(c) for c in background))
    fill = tuple(int(c) for c in np.clip(np.array(colour) + rng.integers(-20, 21, size=3), 0, 255))
    radius = side * rng.uniform(*radius_range)
    x, y = rng.uniform(radius, side - radius, size=2)
    turn = rng.uniform(-0.25, 0.25)
    draw = ImageDraw.Draw(image)
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=max(1, round(radius * 0.35)))
    elif shape == "cross":
        for angle in (turn, turn + math.pi / 2):
            dx, dy = radius * math.cos(angle), radius * math.sin(angle)
            draw.line((x - dx, y - dy, x + dx, y + dy), fill=fill, width=round(radius * 0.5))
    else:
        corners, inner = {"square": (4, 1.0), "triangle": (3, 1.0), "star": (10, 0.42)}[shape]
        points = []
        for k in range(corners):
            r = radius * (inner if k % 2 else 1.0)
            angle = turn + math.pi * (2 * k / corners - 0.5 + (0.25 if shape == "square" else 0))
            points.append((x + r * math.cos(angle), y + r * math.sin(angle)))
        draw.polygon(points, fill=fill)
    place = f"{ROWS[int(3 * y / side)]} {COLUMNS[int(3 * x / side)]}"
    picture = image.resize((size, size), Image.Resampling.BOX)
    return picture, place, GROUNDS[int(background.argmax())]
