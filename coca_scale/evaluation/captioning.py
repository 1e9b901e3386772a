"""Captions for many pictures."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from coca_scale.data.tokens import prompt_ids
from coca_scale.evaluation.encoder import Encoder, stack_pixels
from coca_scale.evaluation.pictures import Picture
from coca_scale.inference.generation_options import GenerationOptions
from coca_scale.inference.prompts import make_prompts
from coca_scale.model.coca import check_length
from coca_scale.recipe.whole_files import write_whole

_TILE = 144
_TEXT_HEIGHT = 34


@dataclass(frozen=True)
class Captioned:
    """One picture with what the model wrote, the best or first caption first.

    Attributes:
        picture: with the captions that it came with.
        captions: `samples` of them.
        scores: log-probability per token of each.
    """

    picture: Picture
    captions: tuple[str, ...]
    scores: tuple[float, ...]

    def without_pixels(self) -> Captioned:
        """The same, small enough for a million of them."""
        picture = replace(self.picture, pixels=self.picture.pixels[:0])
        return replace(self, picture=picture)

    @property
    def right(self) -> bool:
        """Whether the first caption equals one that came with the picture."""
        return letters(self.captions[0]) in {letters(c) for c in self.picture.captions}


def letters(caption: str) -> str:
    """Lower case, no spaces: BPE puts some around punctuation, so they say nothing."""
    return "".join(caption.lower().split())


@dataclass(frozen=True)
class Captioner:
    """A model that writes, and how.

    Attributes:
        encoder: the model.
        options: how captions are written.
        prompt: words that every caption begins with.
        batch_size: pictures at a time.
    """

    encoder: Encoder
    options: GenerationOptions
    prompt: str = ""
    batch_size: int = 64

    def __post_init__(self) -> None:
        """Raises UserError for what `generate` would refuse, before anything is written."""
        config, tokenizer = self.encoder.config, self.encoder.tokenizer
        length = self.options.length(config.context_length)
        check_length(config, length)
        start = prompt_ids(tokenizer, self.prompt)
        make_prompts([start], length, tokenizer.end_id, tokenizer.pad_id, torch.device("cpu"))

    def write(self, pictures: Iterator[Picture]) -> Iterator[list[Captioned]]:
        """Captions in order, a batch at a time."""
        while batch := list(itertools.islice(pictures, self.batch_size)):
            yield self.batch(batch)

    def batch(self, batch: Sequence[Picture]) -> list[Captioned]:
        """Captions of a batch; of an empty one the model runs all the same."""
        tokenizer, size = self.encoder.tokenizer, self.encoder.config.vision_cfg.image_size
        pixels = stack_pixels([picture.pixels for picture in batch], size)
        prompts = [prompt_ids(tokenizer, self.prompt)] * len(pixels)
        seeds = [_seed(picture.key) for picture in batch] or [0]
        written = self.encoder.write(pixels, self.options, prompts, seeds)
        tokens, scores = written.tokens_BNL.tolist(), written.scores_BN.tolist()
        return [
            Captioned(picture, tuple(tokenizer.decode(t) for t in tokens[n]), tuple(scores[n]))
            for n, picture in enumerate(batch)
        ]


def draw_grid(captioned: Sequence[Captioned], path: Path, columns: int = 6) -> None:
    """A PNG of pictures with their captions: green where right, red where not, black unknown."""
    rows = (len(captioned) + columns - 1) // columns
    width, height = _TILE + 12, _TILE + _TEXT_HEIGHT + 8
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, item in enumerate(captioned):
        x, y = (number % columns) * width + 6, (number // columns) * height + 4
        picture = Image.fromarray(item.picture.pixels.permute(1, 2, 0).numpy())
        sheet.paste(picture.resize((_TILE, _TILE), Image.Resampling.BICUBIC), (x, y))
        known = "darkgreen" if item.right else "firebrick"
        colour = known if item.picture.captions else "black"
        text = _wrap(draw.textlength, item.captions[0], _TILE)
        draw.multiline_text((x, y + _TILE + 2), text, fill=colour, spacing=1)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_whole(path, buffer.getvalue())


def _wrap(length: Callable[[str], float], text: str, width: int) -> str:
    """At most two lines that fit."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if length(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines[:2])


def _seed(key: str) -> int:
    """A number of a picture, whatever the order and number of pictures and ranks."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
