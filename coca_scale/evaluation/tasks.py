"""Evaluation of a model on data: zero-shot classification, retrieval, captioning."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from coca_scale.data.sample import DataError
from coca_scale.evaluation.caption_scores import score_captions
from coca_scale.evaluation.captioning import Captioner
from coca_scale.evaluation.pictures import (
    Part,
    Picture,
    Progress,
    count_pictures,
    read_pictures,
)
from coca_scale.evaluation.retrieval import recall, same_caption_ids
from coca_scale.evaluation.zeroshot import Labelled, accuracy, classifier
from coca_scale.inference.load import LoadedModel

NAMES = {
    "top_1": "top-1 accuracy",
    "top_5": "top-5 accuracy",
    "mean_per_class": "mean top-1 of classes",
    "image_to_text_r": "image to text, R@",
    "text_to_image_r": "text to image, R@",
    "bleu_": "BLEU-",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
    "cider": "CIDEr",
    "spice": "SPICE",
    "exact": "captions exactly right",
}


@dataclass
class Result:
    """What was found.

    Attributes:
        task: zeroshot, retrieval or captioning.
        scores: by name, between 0 and 1; CIDEr up to 10.
        counts: pictures, and what belongs to them.
        left_out: scores that could not be computed, and why.
        bad: unusable pictures by cause.
    """

    task: str
    scores: dict[str, float]
    counts: dict[str, int]
    left_out: dict[str, str] = field(default_factory=dict)
    bad: Counter[str] = field(default_factory=Counter)

    def json(self) -> dict[str, Any]:
        """For a file."""
        return {
            "task": self.task,
            "scores": self.scores,
            **self.counts,
            "left_out": self.left_out,
            "skipped": dict(self.bad),
        }

    def show(self, console: Console) -> None:
        """A table; scores in percent, CIDEr as COCO's server shows it."""
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        console.print(f"{self.task}: {counts}", highlight=False)
        table = Table("score", Column("%", justify="right"), box=None)
        for name, value in self.scores.items():
            table.add_row(score_label(name), f"{100 * value:.2f}")
        console.print(table)
        for name, reason in self.left_out.items():
            console.print(f"without {score_label(name)}: {reason}", highlight=False)


@dataclass(frozen=True)
class Evaluation:
    """A model and how it is fed.

    Attributes:
        loaded: the model.
        batch_size: pictures or sentences at a time.
        limit: use at most that many pictures.
        progress: is told of pictures done and in all.
    """

    loaded: LoadedModel
    batch_size: int
    limit: int | None
    progress: Progress

    def zeroshot(self, labelled: Labelled) -> Result:
        """Tell pictures apart into classes.

        Raises:
            DataError: no usable picture, or a class that there is not.
        """
        bad: Counter[str] = Counter()
        features, found = self._encode(labelled.parts, bad)
        labels = torch.tensor([labelled.label(picture) for picture in found])
        texts = self._encode_texts(labelled.classes.prompts())
        scores = accuracy(features, classifier(texts, labelled.classes), labels.to(features.device))
        counts = {"pictures": len(found), "classes": len(labelled.classes.names)}
        return Result("zeroshot", scores, counts, bad=bad)

    def retrieval(self, parts: Sequence[Part], equal_captions: bool) -> Result:
        """Find captions of pictures, and pictures of captions.

        Args:
            parts: pictures with captions.
            equal_captions: any picture with the same first caption is right, for data in which
                captions repeat; otherwise a caption is right for its own picture alone.

        Raises:
            DataError: no usable picture.
        """
        bad: Counter[str] = Counter()
        features, found = self._encode(parts, bad)
        if equal_captions:
            captions = [picture.captions[0] for picture in found]
            image_ids = text_ids = same_caption_ids(captions)
        else:
            captions = [caption for picture in found for caption in picture.captions]
            owners = [i for i, picture in enumerate(found) for _ in picture.captions]
            image_ids, text_ids = torch.arange(len(found)), torch.tensor(owners)
        texts = self._encode_texts(captions)
        device = features.device
        result = recall(features, texts, image_ids.to(device), text_ids.to(device))
        counts = {"pictures": result.images, "captions": result.texts}
        return Result("retrieval", result.scores(), counts, bad=bad)

    def captioning(self, parts: Sequence[Part], captioner: Captioner) -> Result:
        """Write captions and compare them with those that the pictures come with.

        Raises:
            DataError: no usable picture.
        """
        bad: Counter[str] = Counter()
        references: dict[int, tuple[str, ...]] = {}
        captions: dict[int, str] = {}
        exact = 0
        for batch in captioner.write(self._pictures(parts, bad)):
            for item in batch:
                references[len(captions)] = item.picture.captions
                captions[len(captions)] = item.captions[0]
                exact += item.right
            self.progress(len(captions), count_pictures(parts))
        if not captions:
            raise DataError(_NOTHING)
        scores = score_captions(references, captions, java=True)
        values = scores.values | {"exact": exact / len(captions)}
        counts = {"pictures": len(captions), "references": sum(map(len, references.values()))}
        left_out = dict(scores.left_out)
        return Result("captioning", values, counts, left_out, bad)

    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit features, fp32 [n, d]."""
        batches = (texts[i : i + self.batch_size] for i in range(0, len(texts), self.batch_size))
        return torch.cat(
            [self.loaded.encode_text(self.loaded.tokenizer(batch)).float() for batch in batches]
        )

    def _pictures(self, parts: Sequence[Part], bad: Counter[str]) -> Iterator[Picture]:
        size = self.loaded.config.vision_cfg.image_size
        found = read_pictures(parts, size, bad, captions_needed=True)
        return itertools.islice(found, self.limit)

    def _encode(self, parts: Sequence[Part], bad: Counter[str]) -> tuple[Tensor, list[Picture]]:
        """Unit features, fp32 [N, d], and their pictures, without pixels."""
        pictures = self._pictures(parts, bad)
        features, found = [], []
        while batch := list(itertools.islice(pictures, self.batch_size)):
            pixels = torch.stack([picture.pixels for picture in batch])
            features.append(self.loaded.encode_pixels(pixels).float())
            found += [Picture(p.place, p.key, pixels[0, :0], p.captions) for p in batch]
            self.progress(len(found), count_pictures(parts))
        if not found:
            raise DataError(_NOTHING)
        return torch.cat(features), found


_NOTHING = "the data has no usable picture"


def score_label(name: str) -> str:
    """A score as people call it."""
    for start, label in NAMES.items():
        if name.startswith(start):
            return label + name.removeprefix(start)
    return name
