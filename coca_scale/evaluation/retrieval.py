"""Image-text retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coca_scale.evaluation.captioning import letters
from coca_scale.evaluation.encoder import Encoder, Feeding
from coca_scale.evaluation.pictures import PictureSource
from coca_scale.evaluation.results import Kind, Result, Score
from coca_scale.evaluation.rounds import PictureRounds, encode_pictures, encode_texts

CUTS = (1, 5, 10)
KIND = Kind(
    "retrieval",
    "image-text-retrieval",
    {
        f"{direction}_r{k}": Score(f"{label}, R@{k}", headline=k == 1, charted=k < 10)
        for direction, label in (
            ("image_to_text", "image to text"),
            ("text_to_image", "text to image"),
        )
        for k in CUTS
    },
)
_QUERIES, _KEYS = 1024, 65_536


@dataclass(frozen=True)
class Retrieval:
    """Captions of pictures are found, and pictures of captions.

    Attributes:
        pictures: with captions.
        equal_captions: any picture with the same first caption is right, for data in which captions
            repeat; otherwise a caption is right for its own picture alone.
    """

    pictures: PictureSource
    equal_captions: bool = False

    def run(self, encoder: Encoder, feeding: Feeding) -> Result:
        """As of `Evaluator`."""
        rounds = PictureRounds(self.pictures, encoder, feeding)
        rows, captions_here = [], []
        for batch in rounds:
            rows.append(encode_pictures(encoder, batch))
            captions_here += [picture.captions for picture in batch]
        images, captions = rounds.collect_rows(rows), rounds.collect(captions_here)
        if self.equal_captions:
            texts = [of_picture[0] for of_picture in captions]
            image_ids = text_ids = same_caption_ids(texts)
        else:
            texts = [caption for of_picture in captions for caption in of_picture]
            owners = [i for i, of_picture in enumerate(captions) for _ in of_picture]
            image_ids, text_ids = torch.arange(len(captions)), torch.tensor(owners)
        features = encode_texts(encoder, texts, feeding)

        def score() -> Result:
            device = encoder.world.device
            found = recall(*(x.to(device) for x in (images, features, image_ids, text_ids)))
            cut = sum(map(encoder.tokenizer.cuts, texts))
            counts = {"pictures": found.images, "captions": found.texts, "captions_cut": cut}
            return Result(KIND, found.scores(), counts, bad=rounds.bad)

        return encoder.world.on_first(score)


@dataclass(frozen=True)
class Recall:
    """Shares of queries with a right answer among the best k, by k.

    Attributes:
        image_to_text: of images, over all captions.
        text_to_image: of captions, over all images.
        images: number of images.
        texts: number of captions.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    images: int
    texts: int

    def scores(self) -> dict[str, float]:
        """By name."""
        directions = {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}
        return {
            f"{name}_r{k}": value
            for name, found in directions.items()
            for k, value in found.items()
        }


def recall(
    image_features: Tensor, text_features: Tensor, image_ids: Tensor, text_ids: Tensor
) -> Recall:
    """Recall at 1, 5 and 10 in both directions, in pieces: a million of each needs some 5 GB.

    Args:
        image_features: [N, d], unit length.
        text_features: [M, d], unit length.
        image_ids: int64 [N].
        text_ids: int64 [M]; a caption is right for an image with the same id.
    """
    images, texts = (image_features, image_ids), (text_features, text_ids)
    return Recall(
        _recall_at(images, texts), _recall_at(texts, images), len(image_ids), len(text_ids)
    )


def same_caption_ids(captions: Sequence[str]) -> Tensor:
    """Ids of pairs, so that any pair with an equal caption is right: repeated captions are no
    faults."""
    known: dict[str, int] = {}
    return torch.tensor([known.setdefault(letters(c), len(known)) for c in captions])


def _recall_at(queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor]) -> dict[int, float]:
    hits = torch.zeros(len(CUTS), dtype=torch.float64)
    for features, ids in zip(*(part.split(_QUERIES) for part in queries), strict=True):
        right = keys[1][_nearest(features, keys[0])] == ids[:, None]
        hits += torch.stack([right[:, :k].any(1).sum() for k in CUTS]).cpu()
    return {k: float(hit) / len(queries[1]) for k, hit in zip(CUTS, hits, strict=True)}


def _nearest(queries: Tensor, keys: Tensor) -> Tensor:
    """Positions of the best keys of each query, best first, [n, most of CUTS] or all there are."""
    best = queries.new_zeros(len(queries), 0)
    positions = torch.zeros(len(queries), 0, dtype=torch.long, device=queries.device)
    for first in range(0, len(keys), _KEYS):
        scores = queries @ keys[first : first + _KEYS].T
        here = torch.arange(first, first + scores.shape[1], device=keys.device)
        scores = torch.cat([best, scores], 1)
        all_positions = torch.cat([positions, here.expand(len(queries), -1)], 1)
        best, kept = scores.topk(min(max(CUTS), scores.shape[1]))
        positions = all_positions.gather(1, kept)
    return positions
