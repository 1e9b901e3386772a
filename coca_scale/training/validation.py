"""Validation during training: retrieval and sample captions, with equal work on every rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from coca_scale.data.loader import EvalSample, eval_samples
from coca_scale.data.sample import DataError, Source
from coca_scale.data.tokens import Tokenizer
from coca_scale.engine.core import TrainEngine
from coca_scale.evaluation.captioning import letters
from coca_scale.evaluation.retrieval import recall_at_1
from coca_scale.generation.generate import generate
from coca_scale.generation.options import GenerationOptions

BATCH = 64


@dataclass(frozen=True)
class CaptionedPicture:
    """A validation picture with its caption and the model's."""

    pixels: Tensor
    caption: str
    generated: str


@dataclass(frozen=True)
class ValidationResult:
    """Recall in both directions over `samples` pairs, and the captioned pictures of rank 0."""

    image_to_text_r1: float
    text_to_image_r1: float
    samples: int
    pictures: list[CaptionedPicture]


class Validation:
    """Holds this rank's validation samples and measures an engine on them."""

    def __init__(
        self, source: Source, tokenizer: Tokenizer, image_size: int, most: int, captions: int
    ) -> None:
        self._source = source
        self._tokenizer = tokenizer
        self._image_size = image_size
        self._most = most
        self._captions = captions
        self._samples: list[EvalSample] | None = None

    def run(self, engine: TrainEngine) -> ValidationResult:
        """Measure. A collective: every rank runs the model equally often.

        Raises:
            AgreedError: no rank has a usable sample.
        """
        samples = self._load(engine)
        world = engine.world
        sizes = [int(n) for n in world.gather(len(samples)) if isinstance(n, int)]
        rounds = math.ceil(max(sizes) / BATCH)
        features, captions = [], [letters(s.caption) for s in samples]
        for number in range(rounds):
            batch = samples[number * BATCH : (number + 1) * BATCH]
            images, tokens = self._tensors(batch)
            features.append(engine.encode(images, tokens)[: len(batch)].cpu())
        mine = torch.cat(features)
        parts = world.gather((mine, captions))
        everyone = torch.cat([part[0] for part in parts if isinstance(part, tuple)])
        all_captions = [c for part in parts if isinstance(part, tuple) for c in part[1]]
        i2t, t2i = recall_at_1(everyone[:, 0], everyone[:, 1], all_captions)
        return ValidationResult(i2t, t2i, len(all_captions), self._caption(engine, samples))

    def _load(self, engine: TrainEngine) -> list[EvalSample]:
        if self._samples is None:
            world, error = engine.world, None
            try:
                self._samples = eval_samples(
                    self._source, self._image_size, self._most, world.rank, world.size
                )
            except DataError as fault:
                self._samples, error = [], str(fault)
            world.agree(error)
            if not any(world.gather(bool(self._samples))):
                world.agree("data.val has no usable sample")
        return self._samples

    def _tensors(self, batch: list[EvalSample]) -> tuple[Tensor, Tensor]:
        """Images and tokens; a rank without samples left works on a blank one."""
        if not batch:
            size = self._image_size
            blank = torch.zeros(1, 3, size, size, dtype=torch.uint8)
            return blank, self._tokenizer(["blank"])
        captions = [sample.caption for sample in batch]
        return torch.stack([s.pixels for s in batch]), self._tokenizer(captions)

    def _caption(self, engine: TrainEngine, samples: list[EvalSample]) -> list[CaptionedPicture]:
        if not self._captions or engine.module.decoder is None:
            return []
        chosen = samples[: self._captions]
        images, _ = self._tensors(chosen)
        greedy = GenerationOptions("greedy", min_seq_len=0)
        ids = generate(
            engine.module, engine.eval_images(images), self._tokenizer, greedy, same_steps=True
        )
        written = [self._tokenizer.decode(row) for row in ids.tokens_BNL[:, 0].tolist()]
        return [
            CaptionedPicture(s.pixels, s.caption, text)
            for s, text in zip(chosen, written, strict=False)
        ]
