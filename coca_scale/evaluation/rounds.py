"""The work of an evaluation dealt to ranks, and put together again in the order of the inputs.

All ranks go through equally many rounds, as ZeRO-3 needs it; in the last ones a rank may have
nothing left. So what many ranks find is what one finds.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from coca_scale.data.sample import causes_text
from coca_scale.engine.world import World
from coca_scale.errors import AgreedError
from coca_scale.evaluation.encoder import Encoder, Feeding, stack_pixels
from coca_scale.evaluation.pictures import BadPicture, Picture, PictureSource, Place
from coca_scale.model.weights import require_finite_features

T = TypeVar("T")
_END = Place(2**62, 0)


class PictureRounds:
    """Pictures of all ranks, a batch of each at a time. All methods are collectives.

    With `feeding.limit` the pictures used are the first ones of the inputs that can be used, on any
    number of ranks; a few more may be read.

    Attributes:
        bad: after the last round, unusable pictures of all ranks by cause.
    """

    def __init__(self, source: PictureSource, encoder: Encoder, feeding: Feeding) -> None:
        self.bad: Counter[str] = Counter()
        self._world: World = encoder.world
        self._feeding = feeding
        self._source = source
        self._entries = source.entries(
            encoder.config,
            self._world.rank,
            self._world.size,
            feeding.limit is not None,
        )
        self._read_to = Place(-1, 0)
        self._places: list[Place] = []  # of this rank's pictures
        self._bad_here: list[BadPicture] = []
        self._order: list[int] = []  # into the pictures of all ranks, one rank after the other

    def __iter__(self) -> Iterator[list[Picture]]:
        """Batches, which may be empty on a rank that has no more.

        Raises:
            AgreedError: a rank cannot read, or no rank has a usable picture.
        """
        done = 0
        while True:
            batch = self._world.agree(self._next_batch)
            new = int(self._world.sum(len(batch))[0])
            if not new:
                break
            done += new
            self._places += [picture.place for picture in batch]
            yield batch
            self._feeding.progress(done, self._source.count)
            if self._feeding.limit is not None and self._have(self._feeding.limit):
                break
        self._finish()

    def _have(self, limit: int) -> bool:
        """Whether the first `limit` usable pictures are among those that have been read."""
        read_to = min(self._world.gather(self._read_to))  # as far as every rank has come
        known = sum(place <= read_to for place in self._places)
        return self._world.sum(known)[0] >= limit

    def _next_batch(self) -> list[Picture]:
        batch: list[Picture] = []
        for entry in self._entries:
            self._read_to = entry.place
            if isinstance(entry, BadPicture):
                self._bad_here.append(entry)
                continue
            batch.append(entry)
            if len(batch) == self._feeding.batch_size:
                return batch
        self._read_to = _END
        return batch

    def _finish(self) -> None:
        places = [place for part in self._world.gather(self._places) for place in part]
        bad = [entry for part in self._world.gather(self._bad_here) for entry in part]
        self._order = sorted(range(len(places)), key=places.__getitem__)[: self._feeding.limit]
        cut = len(self._order) < len(places) or len(self._order) == self._feeding.limit
        for entry in bad:
            if not cut or entry.place < places[self._order[-1]]:
                self.bad[entry.cause] += entry.lost
        if not self._order:
            found = causes_text(self.bad) or "nothing"
            raise AgreedError(f"{self._source.name} has no usable picture (found {found})")

    def collect(self, of_pictures: Sequence[T]) -> list[T]:
        """Something of each of this rank's pictures, of all ranks in the order of the inputs."""
        everything = [item for part in self._world.gather(list(of_pictures)) for item in part]
        return [everything[index] for index in self._order]

    def collect_rows(self, rows: Sequence[Tensor]) -> Tensor:
        """Rows [n, d], one for each of this rank's pictures; of all ranks [N, d], on the CPU.

        Raises:
            AgreedError: features of used pictures that are not finite.
        """
        mine = torch.cat(list(rows)).cpu()
        found = torch.cat(self._world.gather(mine))[self._order]
        self._world.agree(lambda: require_finite_features(found, "pictures"))
        return found


def encode_pictures(encoder: Encoder, batch: Sequence[Picture]) -> Tensor:
    """Unit features of a rank's batch, a row each; the model runs for an empty one too."""
    size = encoder.config.vision_cfg.image_size
    pixels = stack_pixels([picture.pixels for picture in batch], size)
    return encoder.encode_images(pixels)[: len(batch)]


def encode_texts(encoder: Encoder, texts: Sequence[str], feeding: Feeding) -> Tensor:
    """Unit features of texts that every rank has, fp32 [n, d] on the CPU. A collective.

    Raises:
        AgreedError: features that are not finite.
    """
    world = encoder.world
    first, last = (len(texts) * rank // world.size for rank in (world.rank, world.rank + 1))
    found: list[Tensor] = []
    for batch in _in_rounds(texts[first:last], feeding.batch_size, world):
        tokens = encoder.tokenizer(batch or ["blank"])
        found.append(encoder.encode_texts(tokens)[: len(batch)].cpu())
    features = torch.cat([rows for of_rank in world.gather(found) for rows in of_rank])
    world.agree(lambda: require_finite_features(features, "captions"))
    return features


def _in_rounds(items: Iterable[T], size: int, world: World) -> Iterator[list[T]]:
    """Batches, as many on every rank."""
    iterator = iter(items)
    while True:
        batch = list(itertools.islice(iterator, size))
        if not world.sum(len(batch))[0]:
            return
        yield batch
