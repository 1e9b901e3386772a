"""Validation during training, with equal work on every rank: under ZeRO-3 the model runs together.

Shapes: W ranks; every rank runs the model on as many batches as the one with most samples, on blank
ones where it has none left.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from coca_scale.data.sample import DataError, Source, causes_text
from coca_scale.data.tokens import Tokenizer
from coca_scale.engine.train_engine import TrainEngine
from coca_scale.evaluation.caption_scores import score_captions
from coca_scale.evaluation.captioning import Captioned
from coca_scale.evaluation.pictures import Picture, first_pictures, read_pictures
from coca_scale.evaluation.retrieval import recall, same_caption_ids
from coca_scale.evaluation.zeroshot import Labelled, accuracy, classifier
from coca_scale.inference.generate import generate
from coca_scale.inference.generation_options import GenerationOptions
from coca_scale.recipe.schema import EvalSection

BATCH = 64
GREEDY = GenerationOptions("greedy", min_seq_len=0)


@dataclass(frozen=True)
class ValidationResult:
    """Scores by name, and captioned pictures of rank 0.

    Attributes:
        scores: retrieval over `samples` pairs; captioning and zero-shot if the recipe asks for it.
        samples: pairs of picture and caption.
        captioned: pictures with the model's captions.
    """

    scores: dict[str, float]
    samples: int
    captioned: list[Captioned] = field(default_factory=list)


class Validation:
    """Holds this rank's validation samples and measures an engine on them."""

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        image_size: int,
        settings: EvalSection,
        labelled: Labelled | None,
    ) -> None:
        """`labelled`: pictures for zero-shot classification, if any."""
        self._source = source
        self._tokenizer = tokenizer
        self._image_size = image_size
        self._settings = settings
        self._labelled = labelled
        self._samples: list[Picture] | None = None

    def run(self, engine: TrainEngine) -> ValidationResult:
        """Measure. A collective: every rank runs the model equally often.

        Raises:
            AgreedError: no rank has a usable sample, or a rank cannot read its own.
        """
        samples = self._load(engine)
        features = self._encode_images(engine, [s.pixels for s in samples])
        captions = [s.captions[0] for s in samples]
        texts = self._encode_texts(engine, captions)
        parts: list[Any] = engine.world.gather((features, texts, captions))
        images, texts = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        ids = same_caption_ids([caption for part in parts for caption in part[2]])
        scores = recall(images, texts, ids, ids).scores()
        captioned = self._caption(engine, samples)
        scores |= self._score(engine, captioned)
        scores |= self._classify(engine)
        shown = captioned[: self._settings.captions]
        return ValidationResult(scores, len(ids), shown if engine.world.rank == 0 else [])

    def _load(self, engine: TrainEngine) -> list[Picture]:
        if self._samples is None:
            world, error = engine.world, None
            bad: Counter[str] = Counter()
            most = self._settings.samples
            try:
                self._samples, bad = first_pictures(
                    self._source, self._image_size, most, world.rank, world.size
                )
            except DataError as fault:
                self._samples, error = [], str(fault)
            world.fail_together(error)
            if not any(world.gather(bool(self._samples))):
                counts: list[Any] = world.gather(bad)
                found = causes_text(sum(counts, Counter())) or "nothing"
                world.fail_together(f"data.val has no usable sample (found {found})")
        return self._samples

    def _caption(self, engine: TrainEngine, samples: Sequence[Picture]) -> list[Captioned]:
        """Captions of this rank's share of the scored pictures, and of those that are shown."""
        if engine.module.decoder is None:
            return []
        share = math.ceil(self._settings.scored_captions / engine.world.size)
        most = max(share, self._settings.captions)
        chosen = list(samples[:most])
        written: list[Captioned] = []
        for first in range(0, most, BATCH):
            batch = chosen[first : first + BATCH]
            pixels = self._stack([picture.pixels for picture in batch])
            found = generate(
                engine.module, engine.eval_images(pixels), self._tokenizer, GREEDY, same_steps=True
            )
            rows = zip(  # a blank picture has no row
                batch, found.tokens_BNL[:, 0].tolist(), found.scores_BN.tolist(), strict=False
            )
            for picture, ids, scores in rows:
                text = self._tokenizer.decode(ids)
                written.append(Captioned(picture, (text,), tuple(scores)))
        return written

    def _score(self, engine: TrainEngine, captioned: Sequence[Captioned]) -> dict[str, float]:
        """Caption scores, on rank 0."""
        if not self._settings.scored_captions or engine.module.decoder is None:
            return {}
        share = math.ceil(self._settings.scored_captions / engine.world.size)
        mine = [(item.picture.captions, item.captions[0]) for item in captioned[:share]]
        parts: list[Any] = engine.world.gather(mine)
        everyone = [pair for part in parts for pair in part]
        if engine.world.rank:
            return {}
        references = {number: pair[0] for number, pair in enumerate(everyone)}
        captions = {number: pair[1] for number, pair in enumerate(everyone)}
        return score_captions(references, captions, java=False).values

    def _classify(self, engine: TrainEngine) -> dict[str, float]:
        """Zero-shot accuracy."""
        labelled, world = self._labelled, engine.world
        if labelled is None:
            return {}
        prompts = labelled.classes.prompts()
        share = math.ceil(len(prompts) / world.size)
        texts = self._encode_texts(engine, prompts[world.rank * share : (world.rank + 1) * share])
        pictures, error = self._labelled_share(engine, labelled)
        world.fail_together(error)
        images = self._encode_images(engine, [picture.pixels for picture in pictures])
        labels = [labelled.label(picture) for picture in pictures]
        parts: list[Any] = world.gather((texts, images, labels))
        weights = classifier(torch.cat([part[0] for part in parts]), labelled.classes)
        features = torch.cat([part[1] for part in parts])
        every_label = torch.tensor([label for part in parts for label in part[2]])
        return {f"zeroshot_{k}": v for k, v in accuracy(features, weights, every_label).items()}

    def _labelled_share(
        self, engine: TrainEngine, labelled: Labelled
    ) -> tuple[list[Picture], str | None]:
        """This rank's pictures, or what is wrong with them."""
        world, bad = engine.world, Counter[str]()
        try:
            found = read_pictures(
                labelled.parts, self._image_size, bad, rank=world.rank, ranks=world.size
            )
            pictures = list(found)
            for picture in pictures:
                labelled.label(picture)
        except DataError as fault:
            return [], str(fault)
        return pictures, None

    def _encode_images(self, engine: TrainEngine, pixels: Sequence[Tensor]) -> Tensor:
        return self._in_rounds(
            engine, pixels, lambda batch: engine.encode_images(self._stack(batch))
        )

    def _encode_texts(self, engine: TrainEngine, captions: Sequence[str]) -> Tensor:
        return self._in_rounds(
            engine, captions, lambda batch: engine.encode_texts(self._tokenizer(batch or ["blank"]))
        )

    def _in_rounds(
        self, engine: TrainEngine, items: Sequence[Any], encode: Callable[[list[Any]], Tensor]
    ) -> Tensor:
        """Features [n, d] of this rank's items, on the CPU."""
        sizes = [int(n) for n in engine.world.gather(len(items)) if isinstance(n, int)]
        features = []
        for number in range(math.ceil(max(sizes) / BATCH)):
            batch = list(items[number * BATCH : (number + 1) * BATCH])
            features.append(encode(batch)[: len(batch)].cpu())
        return torch.cat(features)

    def _stack(self, pixels: Sequence[Tensor]) -> Tensor:
        """A batch; a blank one if there is nothing."""
        size = self._image_size
        if not pixels:
            return torch.zeros(1, 3, size, size, dtype=torch.uint8)
        return torch.stack(list(pixels))
