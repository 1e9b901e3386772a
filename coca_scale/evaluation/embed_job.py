"""Features of shards as a job: one rank or many, a file per shard, on from where it stopped."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from coca_scale.data.sample import DataError, causes_text
from coca_scale.data.stored_features import (
    FeatureFile,
    TeacherFacts,
    feature_file,
    twice,
    write_facts,
    write_features,
)
from coca_scale.engine.ownership import Owner, owned
from coca_scale.engine.world import World
from coca_scale.errors import AgreedError
from coca_scale.evaluation.encoder import Encoder, Progress
from coca_scale.evaluation.pictures import Part, Picture, read_pictures
from coca_scale.model.weights import require_finite_features
from coca_scale.recipe.lock import folder_claim

_UNREAD = ("missing_shard", "unreadable_shard")


@dataclass
class Embedded:
    """What a call did, on all ranks.

    Attributes:
        written: pictures of this call.
        captions: of them.
        there: pictures that earlier calls had embedded.
        bad: unusable pictures by cause.
        seconds: of the slowest rank, from its first picture to its last.
    """

    written: int = 0
    captions: int = 0
    there: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def per_second(self) -> float:
        """Pictures per second of all ranks."""
        return self.written / max(self.seconds, 1e-9)


class EmbedJob:
    """Stores features of shards; a collective if there are several ranks."""

    def __init__(
        self,
        encoder: Encoder,
        facts: TeacherFacts,
        parts: Sequence[Part],
        progress: Progress,
        batch_size: int = 64,
    ) -> None:
        """What is embedded.

        Args:
            encoder: the teacher.
            facts: of it, for whoever reads the features.
            parts: shards, whose pictures come with captions.
            progress: is told of shards done and in all.
            batch_size: pictures and captions at a time.

        Raises:
            DataError: inputs that are no shards, or two of the same name.
        """
        others = [part.name for part in parts if not part.is_shard]
        if others:
            raise DataError(f"{others[0]}: features are of shards; pack it: coca-scale data pack")
        if (name := twice(part.name for part in parts)) is not None:
            raise DataError(
                f"two shards would have their features in {name}: a shard is known by its name "
                "alone; rename one, or train on them one after the other in stages"
            )
        self._encoder, self._facts, self._parts = encoder, facts, parts
        self._progress, self._batch_size = progress, batch_size
        self._world: World = encoder.world
        self._done = Embedded()

    def to_folder(self, folder: Path) -> Embedded:
        """A file for every shard that has none yet; none for one that cannot be read to its end.

        Raises:
            DataError: a folder of another teacher.
            AgreedError: no picture can be used, or another job writes into the folder.
        """
        with owned(folder_claim(folder), self._world) as owner:
            return self._to_folder(folder, owner)

    def _to_folder(self, folder: Path, owner: Owner) -> Embedded:
        world, parts, done = self._world, self._parts, self._done
        world.on_first(lambda: write_facts(folder, self._facts))
        for number in range(world.rank, len(parts), world.size):
            path = folder / feature_file(parts[number].name)
            if path.is_file():
                done.there += FeatureFile(path, self._facts.embed_dim).pictures
            else:
                owner.require()
                self._embed(parts[number], path)
            self._progress(min(number + world.size, len(parts)), len(parts))
        self._add_up()
        if not done.written + done.there:
            found = causes_text(done.bad) or "none"
            raise AgreedError(f"no picture with a caption can be embedded (found {found})")
        return done

    def _embed(self, part: Part, path: Path) -> None:
        started, done = time.perf_counter(), self._done
        before = done.bad.copy()
        config = self._encoder.config
        width, size = config.embed_dim, config.vision_cfg.image_size
        samples: list[tuple[str, tuple[str, ...]]] = []
        images, texts = [torch.empty(0, width)], [torch.empty(0, width)]
        pictures = read_pictures([part], config, done.bad)
        for batch in _batches(self._captioned(pictures), self._batch_size):
            pixels = torch.stack([picture.pixels for picture in batch])
            assert pixels.shape[-1] == size
            images.append(self._encoder.encode_images(pixels).cpu())
            captions = [caption for picture in batch for caption in picture.captions]
            texts += self._texts(captions)
            samples += [(picture.key, picture.captions) for picture in batch]
        if any(done.bad[cause] > before[cause] for cause in _UNREAD):
            return  # there may be more of it another time
        found = torch.cat(images), torch.cat(texts)
        require_finite_features(torch.cat(found), "pictures and captions")
        write_features(path, samples, *found)
        done.written += len(samples)
        done.captions += len(found[1])
        done.seconds += time.perf_counter() - started

    def _captioned(self, pictures: Iterator[Picture]) -> Iterator[Picture]:
        """Those that training can use."""
        for picture in pictures:
            if picture.captions:
                yield picture
            else:
                self._done.bad["missing_caption"] += 1

    def _texts(self, captions: list[str]) -> list[Tensor]:
        encoder, size = self._encoder, self._batch_size
        some = (captions[start : start + size] for start in range(0, len(captions), size))
        return [encoder.encode_texts(encoder.tokenizer(few)).cpu() for few in some]

    def _add_up(self) -> None:
        """Wait for all ranks, and add up what they did."""
        mine = self._done
        found = self._world.gather(mine)
        mine.written = sum(one.written for one in found)
        mine.captions = sum(one.captions for one in found)
        mine.there = sum(one.there for one in found)
        mine.bad = sum((one.bad for one in found), Counter())
        mine.seconds = max(one.seconds for one in found)


def _batches(pictures: Iterator[Picture], size: int) -> Iterator[list[Picture]]:
    while batch := list(itertools.islice(pictures, size)):
        yield batch
