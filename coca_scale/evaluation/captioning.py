"""Caption pictures from files, folders, tables, shards or synthetic data."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from PIL import Image, ImageDraw

from coca_scale.data.images import IMAGE_EXTENSIONS, decode_image, eval_pixels
from coca_scale.data.loader import EvalSample
from coca_scale.data.sample import BadSample, DataError, RawSample
from coca_scale.data.sources import open_source
from coca_scale.engine.loading import LoadedModel
from coca_scale.evaluation.retrieval import recall_at_1
from coca_scale.model.image import normalize_pixels
from coca_scale.recipe.schema import DataSection

_TILE = 144
_TEXT_HEIGHT = 34


@dataclass(frozen=True)
class Captioned:
    """One picture with what the model wrote; `caption` is the true one, empty if unknown."""

    sample: EvalSample
    generated: str

    @property
    def right(self) -> bool:
        """Whether the generated caption equals the true one but for case and spaces.

        BPE puts spaces around punctuation, so spaces say nothing.
        """
        return letters(self.sample.caption) == letters(self.generated)


def letters(caption: str) -> str:
    """Lower case, no spaces."""
    return "".join(caption.lower().split())


def read_pictures(inputs: Sequence[str], data: DataSection) -> Iterator[RawSample | BadSample]:
    """Pictures of each input: an image file, a folder, or anything `data.train` takes.

    Raises:
        DataError: an input that names nothing.
    """
    suffixes = {f".{extension}" for extension in IMAGE_EXTENSIONS}
    for name in inputs:
        path = Path(name)
        if path.is_dir() and not any(path.glob("*.tar")):
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes)
            if not files:
                raise DataError(f"{name}: no pictures in this folder")
            yield from (RawSample(str(p), p.read_bytes()) for p in files)
        elif path.suffix.lower() in suffixes:
            if not path.is_file():
                raise DataError(f"{name}: no such file")
            yield RawSample(name, path.read_bytes())
        else:
            source = open_source(name, data, seed=0)
            source.check()
            yield from source.ordered(0, 1)


def caption_pictures(
    loaded: LoadedModel,
    pictures: Iterator[RawSample | BadSample],
    batch_size: int,
    bad: Counter[str],
) -> Iterator[Captioned]:
    """Greedy captions, in order; unusable pictures are counted in `bad` and left out."""
    usable = _decoded(loaded, pictures, bad)
    while batch := list(itertools.islice(usable, batch_size)):
        images = normalize_pixels(torch.stack([s.pixels for s in batch]), torch.float32)
        for sample, row in zip(batch, loaded.generate(images).tolist(), strict=True):
            yield Captioned(sample, loaded.tokenizer.decode(row))


def write_jsonl(captioned: Iterator[Captioned], file: TextIO) -> list[Captioned]:
    """One JSON object per picture: key, caption, and the true caption where there is one."""
    written = []
    for item in captioned:
        line = {"key": item.sample.key, "caption": item.generated}
        if item.sample.caption:
            line["reference"] = item.sample.caption
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        written.append(item)
    return written


def retrieval(loaded: LoadedModel, samples: Sequence[EvalSample]) -> tuple[float, float]:
    """R@1 image to text and text to image over samples with captions."""
    images, texts = [], []
    for start in range(0, len(samples), 64):
        batch = samples[start : start + 64]
        pixels = normalize_pixels(torch.stack([s.pixels for s in batch]), torch.float32)
        images.append(loaded.encode_image(pixels))
        tokens = loaded.tokenizer([s.caption for s in batch])
        texts.append(loaded.encode_text(tokens))
    captions = [letters(sample.caption) for sample in samples]
    return recall_at_1(torch.cat(images), torch.cat(texts), captions)


def draw_grid(captioned: Sequence[Captioned], path: Path, columns: int = 6) -> None:
    """A PNG of pictures with their captions: green where right, red where not, black unknown."""
    rows = (len(captioned) + columns - 1) // columns
    width, height = _TILE + 12, _TILE + _TEXT_HEIGHT + 8
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, item in enumerate(captioned):
        x, y = (number % columns) * width + 6, (number // columns) * height + 4
        picture = Image.fromarray(item.sample.pixels.permute(1, 2, 0).numpy())
        sheet.paste(picture.resize((_TILE, _TILE), Image.Resampling.BICUBIC), (x, y))
        colour = ("darkgreen" if item.right else "firebrick") if item.sample.caption else "black"
        text = _wrap(draw, item.generated, _TILE)
        draw.multiline_text((x, y + _TILE + 2), text, fill=colour, spacing=1)
    sheet.save(path)


def _wrap(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """At most two lines that fit."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines[:2])


def _decoded(
    loaded: LoadedModel, pictures: Iterator[RawSample | BadSample], bad: Counter[str]
) -> Iterator[EvalSample]:
    size = loaded.config.vision_cfg.image_size
    for picture in pictures:
        try:
            if isinstance(picture, BadSample):
                raise picture
            pixels = eval_pixels(decode_image(picture.image, picture.key), size)
        except BadSample as error:
            bad[error.cause] += 1
            continue
        yield EvalSample(picture.key, pixels, picture.caption)
