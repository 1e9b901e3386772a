"""Global batches from lanes: the same samples in the same order on any number of ranks and workers.

Step t takes `samples_per_lane` good samples from every lane, in lane order. A rank reads a
consecutive range of lanes, and deals it to its workers in consecutive ranges again, so putting the
workers' pieces together in order gives the rank's share of the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from coca_scale.data.images import decode_image, eval_pixels, train_pixels
from coca_scale.data.sample import BadSample, DataError, Position, RawSample, Source
from coca_scale.data.tokens import Tokenizer

LaneStates = dict[int, Position]


@dataclass(frozen=True)
class StepBatch:
    """One rank's share of an optimizer step.

    Attributes:
        images: uint8 [n, 3, H, W].
        tokens: int64 [n, T].
        keys: sample names.
        lanes: where each of this rank's lanes stands once this batch has been used.
        bad: samples skipped on the way here, by cause.
    """

    images: Tensor
    tokens: Tensor
    keys: list[str]
    lanes: LaneStates
    bad: Counter[str]


def decode_sample(
    sample: RawSample, tokenizer: Tokenizer, size: int, crop: tuple[float, np.random.Generator]
) -> tuple[Tensor, Tensor]:
    """Pixels uint8 [3, size, size] and token ids [T] of one training sample.

    Args:
        sample: the raw sample.
        tokenizer: cuts captions that are longer than the context, keeping the end token.
        size: pixels per side.
        crop: smallest area share of the crop, and the generator that draws it.

    Raises:
        BadSample: the image cannot be used, or the caption has no words.
    """
    if not sample.caption.strip():
        raise BadSample("empty_caption", sample.key)
    image = decode_image(sample.image, sample.key)
    return train_pixels(image, size, *crop), tokenizer([sample.caption])[0]


class _LaneReader:
    """The endless stream of good samples of one lane."""

    def __init__(self, dataset: TrainDataset, lane: int, position: Position) -> None:
        self.position = position
        self.bad: Counter[str] = Counter()
        self._dataset = dataset
        self._lane = lane
        self._stream = self._read()

    def take(self) -> tuple[str, Tensor, Tensor]:
        """The next good sample: key, pixels, tokens."""
        return next(self._stream)

    def _read(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        d = self._dataset
        while True:
            whole_epoch = self.position[1:] == (0, 0)
            good = 0
            causes: Counter[str] = Counter()
            for after, sample in d.source.lane(self._lane, d.lanes, self.position):
                rng = np.random.default_rng([d.seed, self._lane, *self.position])
                self.position = after
                try:
                    if isinstance(sample, BadSample):
                        raise sample
                    crop = (d.crop_scale_min, rng)
                    pixels, tokens = decode_sample(sample, d.tokenizer, d.image_size, crop)
                except BadSample as bad:
                    self.bad[bad.cause] += 1
                    causes[bad.cause] += 1
                    continue
                good += 1
                yield sample.key, pixels, tokens
            if whole_epoch and not good:
                found = ", ".join(f"{n} × {cause}" for cause, n in causes.items()) or "nothing"
                raise DataError(
                    f"lane {self._lane} of {d.lanes} has no usable sample (found {found}); "
                    "check data.train, or lower data.lanes"
                )
            self.position = Position(self.position.epoch + 1)


@dataclass
class TrainDataset(IterableDataset):
    """Pieces of step batches; the worker that runs it decides which lanes it reads."""

    source: Source
    tokenizer: Tokenizer
    image_size: int
    crop_scale_min: float
    seed: int
    lanes: int
    samples_per_lane: int
    states: LaneStates

    def __iter__(self) -> Iterator[StepBatch | str]:
        """Endless; a DataError ends it and comes out as its text, so that all ranks can agree."""
        info = get_worker_info()
        mine = sorted(self.states)
        if info is not None:
            torch.set_num_threads(1)
            count = len(mine)
            mine = mine[
                info.id * count // info.num_workers : (info.id + 1) * count // info.num_workers
            ]
        readers = {lane: _LaneReader(self, lane, self.states[lane]) for lane in mine}
        try:
            while True:
                yield self._piece(readers)
        except DataError as error:
            yield str(error)

    def _piece(self, readers: Mapping[int, _LaneReader]) -> StepBatch:
        taken = [r.take() for r in readers.values() for _ in range(self.samples_per_lane)]
        bad: Counter[str] = Counter()
        for reader in readers.values():
            bad += reader.bad
            reader.bad = Counter()
        return StepBatch(
            images=torch.stack([pixels for _, pixels, _ in taken]),
            tokens=torch.stack([tokens for _, _, tokens in taken]),
            keys=[key for key, _, _ in taken],
            lanes={lane: reader.position for lane, reader in readers.items()},
            bad=bad,
        )


class TrainLoader:
    """Iterates over this rank's share of every step."""

    def __init__(self, dataset: TrainDataset, workers: int) -> None:
        self._workers = min(workers, len(dataset.states))
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=self._workers,
            persistent_workers=self._workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[StepBatch]:
        """Endless.

        Raises:
            DataError: the data cannot be used.
        """
        pieces = iter(self._loader)
        while True:
            step = [next(pieces) for _ in range(max(1, self._workers))]
            for piece in step:
                if isinstance(piece, str):
                    raise DataError(piece)
            yield _join(step)


def _join(pieces: Sequence[StepBatch]) -> StepBatch:
    if len(pieces) == 1:
        return pieces[0]
    return StepBatch(
        images=torch.cat([p.images for p in pieces]),
        tokens=torch.cat([p.tokens for p in pieces]),
        keys=[key for p in pieces for key in p.keys],
        lanes={lane: position for p in pieces for lane, position in p.lanes.items()},
        bad=sum((p.bad for p in pieces), Counter()),
    )


def deal_lanes(
    lanes: int, rank: int, ranks: int, saved: Sequence[Sequence[int]] | None
) -> LaneStates:
    """This rank's lanes and where they start, from a checkpoint's list or from the beginning.

    Raises:
        DataError: the checkpoint has another number of lanes.
    """
    if saved is not None and len(saved) != lanes:
        raise DataError(
            f"the checkpoint was written with {len(saved)} lanes and the recipe gives {lanes}; "
            f"set data.lanes={len(saved)} to go on in the same order"
        )
    mine = range(rank * lanes // ranks, (rank + 1) * lanes // ranks)
    return {lane: Position(*saved[lane]) if saved is not None else Position() for lane in mine}


@dataclass(frozen=True)
class EvalSample:
    """One validation sample: uint8 pixels [3, H, W], its caption and name."""

    key: str
    pixels: Tensor
    caption: str


def eval_samples(
    source: Source, image_size: int, most: int, rank: int, ranks: int
) -> list[EvalSample]:
    """This rank's share of the first `most` samples, in storage order; bad ones are left out."""
    samples = []
    share = len(range(rank, most, ranks))
    for number, sample in enumerate(source.ordered(rank, ranks)):
        if number == share:
            break
        try:
            if isinstance(sample, BadSample):
                raise sample
            pixels = eval_pixels(decode_image(sample.image, sample.key), image_size)
        except BadSample:
            continue
        samples.append(EvalSample(sample.key, pixels, sample.caption))
    return samples
