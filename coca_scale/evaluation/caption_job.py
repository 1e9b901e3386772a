"""Captioning as a job: one rank or many, into a file or side-cars, on from where it stopped."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coca_scale.data.sample import causes_text
from coca_scale.engine.ownership import Owner, owned
from coca_scale.engine.world import World
from coca_scale.errors import AgreedError
from coca_scale.evaluation.caption_files import CaptionFile, SideCars
from coca_scale.evaluation.captioning import Captioned, Captioner
from coca_scale.evaluation.encoder import Progress
from coca_scale.evaluation.pictures import (
    Part,
    Picture,
    count_pictures,
    read_pictures,
)
from coca_scale.recipe.lock import file_claim, folder_claim

SHOWN_PICTURES = 30


@dataclass
class Summary:
    """What a call did, on all ranks.

    Attributes:
        written: captions of this call.
        there: pictures that an earlier call had captioned.
        bad: unusable pictures by cause.
        seconds: of this rank, from the first picture to the last.
        shown: the first captioned pictures of this rank.
    """

    written: int = 0
    there: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    shown: list[Captioned] = field(default_factory=list)

    @property
    def captioned(self) -> int:
        """Pictures that have captions now."""
        return self.written + self.there

    @property
    def per_second(self) -> float:
        """Pictures per second of all ranks."""
        return self.written / max(self.seconds, 1e-9)


class CaptionJob:
    """Writes captions of pictures; a collective if there are several ranks."""

    def __init__(
        self,
        captioner: Captioner,
        parts: Sequence[Part],
        settings: Mapping[str, Any],
        world: World,
        progress: Progress,
    ) -> None:
        """`settings` tell one job from another; `progress` is told of pictures done and in all."""
        self._captioner = captioner
        self._parts = parts
        self._settings = settings
        self._world = world
        self._rank, self._ranks = world.rank, world.size
        self._progress = progress
        self._summary = Summary()
        self._total = count_pictures(parts)

    def to_file(self, out: Path) -> Summary:
        """One JSON object per picture, in the order of the inputs.

        Raises:
            DataError: the file was begun with other settings.
            AgreedError: no picture can be used, or another job writes the file.
        """
        with owned(file_claim(out), self._world) as owner:
            return self._to_file(out, owner)

    def _to_file(self, out: Path, owner: Owner) -> Summary:
        file = CaptionFile(out, self._rank, self._ranks, self._settings)
        self._summary.there = len(file.done)
        try:
            for batch in self._batches(self._parts, self._rank, self._ranks, file.done):
                owner.require()
                file.add(batch)
        finally:
            file.close()
        self._add_up()
        if not self._summary.captioned:
            file.discard()
            raise self._nothing()
        self._world.on_first(owner.require)
        self._world.on_first(file.merge)
        return self._summary

    def to_folder(self, folder: Path) -> Summary:
        """A side-car for every shard.

        Raises:
            DataError: inputs that are no shards, or a folder of another job.
            AgreedError: no picture can be used, or another job writes into the folder.
        """
        side_cars = SideCars(folder, self._parts)
        with owned(folder_claim(folder), self._world) as owner:
            return self._to_folder(side_cars, owner)

    def _to_folder(self, side_cars: SideCars, owner: Owner) -> Summary:
        # more shards may be captioned into it later
        settings = {name: value for name, value in self._settings.items() if name != "inputs"}
        side_cars.settle(settings)
        for number in range(self._rank, len(self._parts), self._ranks):
            if side_cars.is_done(number):
                self._summary.there += side_cars.count(number)
            else:
                owner.require()
                side_cars.add(number, self._batches(self._parts[number : number + 1], 0, 1))
        self._summary.there = int(self._world.sum(self._summary.there)[0])
        self._add_up()
        if not self._summary.captioned:
            raise self._nothing()
        return self._summary

    def _batches(
        self, parts: Sequence[Part], rank: int, ranks: int, done: frozenset[Any] = frozenset()
    ) -> Iterator[list[Captioned]]:
        summary, model = self._summary, self._captioner.encoder.config
        pictures: Iterator[Picture] = read_pictures(
            parts, model, summary.bad, rank=rank, ranks=ranks, done=done
        )
        started = time.perf_counter() - summary.seconds
        for batch in self._captioner.write(pictures):
            summary.written += len(batch)
            summary.seconds = time.perf_counter() - started
            missing = SHOWN_PICTURES - len(summary.shown)
            summary.shown += itertools.islice(batch, max(0, missing))
            yield batch
            self._progress((summary.written + sum(summary.bad.values())) * ranks, self._total)

    def _nothing(self) -> AgreedError:
        found = causes_text(self._summary.bad) or "none"
        return AgreedError(f"no picture can be captioned (found {found})")

    def _add_up(self) -> None:
        """Wait for all ranks, and add up what they did."""
        mine = self._summary
        found = self._world.gather((mine.written, mine.bad, mine.seconds))
        mine.written = sum(written for written, _, _ in found)
        mine.bad = sum((bad for _, bad, _ in found), Counter())
        mine.seconds = max(seconds for _, _, seconds in found)
