"""Global batches from lanes: the same samples in the same order on any number of ranks and workers.

Step t takes `samples_per_lane` good samples from every lane, in lane order. A rank reads a
consecutive range of lanes, and deals it to its workers in consecutive ranges again, so putting the
workers' pieces together in order gives the rank's share of the step.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from coca_scale.data.images import TrainCrop, train_pixels
from coca_scale.data.sample import (
    BadSample,
    DataError,
    Position,
    RawSample,
    Skipped,
    Source,
    causes_text,
)
from coca_scale.data.tokens import Tokenizer

MAX_EMPTY_EPOCHS = 10
LOOK_SECONDS = 1.0

LaneStates = dict[int, Position]
# what a teacher is told of a sample and the caption that was drawn; raises BadSample
Tell = Callable[[RawSample, str], Tensor]


@dataclass(frozen=True)
class StepBatch:
    """One rank's share of an optimizer step.

    Attributes:
        images: uint8 [n, 3, H, W], channels last in memory.
        tokens: int64 [n, T].
        told: what a teacher is told of the samples, [n, …]; None where it is `tokens`, or nobody.
        keys: sample names.
        share_indices: int64 [n], index of each sample in this share before it was arranged.
        lanes: where each of this rank's lanes stands once this batch has been used.
        skipped: samples left out on the way here, by fault or by filter.
    """

    images: Tensor
    tokens: Tensor
    told: Tensor | None
    keys: list[str]
    share_indices: Tensor
    lanes: LaneStates
    skipped: list[Skipped]


def decode_sample(
    sample: RawSample, tokenizer: Tokenizer, crop: TrainCrop, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Pixels uint8 [3, size, size] and token ids [T] of one training sample.

    Args:
        sample: the raw sample; one of its captions is drawn.
        tokenizer: cuts captions that are longer than the context, keeping the end token.
        crop: how the picture is cropped.
        rng: draws the caption and the crop.

    Raises:
        BadSample: the image cannot be used or is filtered out, or the caption has no words.
    """
    pixels, caption = drawn_sample(sample, crop, rng)
    return pixels, tokenizer([caption])[0]


def drawn_sample(
    sample: RawSample, crop: TrainCrop, rng: np.random.Generator
) -> tuple[Tensor, str]:
    """Pixels and the caption that was drawn; arguments and errors as of `decode_sample`."""
    if not sample.caption:
        raise BadSample("empty_caption", sample.key)
    caption = sample.caption
    if len(sample.captions) > 1:
        weights = np.cumsum([weight for _, weight in sample.captions])
        drawn = np.searchsorted(weights, rng.uniform(0.0, weights[-1]), side="right")
        caption = sample.captions[min(int(drawn), len(weights) - 1)][0]
    return train_pixels(sample.image, sample.key, crop, rng), caption


@dataclass(frozen=True)
class _Taken:
    """A good sample, ready to be stacked."""

    key: str
    pixels: Tensor
    tokens: Tensor
    told: Tensor | None


class _LaneReader:
    """The endless stream of good samples of one lane."""

    def __init__(self, dataset: TrainDataset, lane: int, position: Position) -> None:
        self.position = position
        self.skipped: list[Skipped] = []
        self._dataset = dataset
        self._lane = lane
        self._stream = self._read()

    def take(self) -> _Taken:
        """The next good sample."""
        return next(self._stream)

    def _read(self) -> Iterator[_Taken]:
        d = self._dataset
        empty = 0
        while True:
            good = False
            causes: Counter[str] = Counter()
            for after, sample in d.source.lane(self._lane, d.lanes, self.position):
                rng = np.random.default_rng([d.seed, self._lane, *self.position])
                self.position = after
                try:
                    if isinstance(sample, BadSample):
                        raise sample
                    pixels, caption = drawn_sample(sample, d.crop, rng)
                    told = None if d.tell is None else d.tell(sample, caption)
                except BadSample as bad:
                    skipped = bad.skipped
                    if isinstance(sample, RawSample):
                        skipped = skipped._replace(shard=sample.shard)
                    self.skipped.append(skipped)
                    causes[skipped.cause] += skipped.lost
                    continue
                good = True
                yield _Taken(sample.key, pixels, d.tokenizer([caption])[0], told)
            empty = 0 if good else empty + 1
            if empty == MAX_EMPTY_EPOCHS:  # each had other shards
                found = causes_text(causes) or "nothing"
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
    crop: TrainCrop
    seed: int
    lanes: int
    samples_per_lane: int
    states: LaneStates
    tell: Tell | None = None

    def __iter__(self) -> Iterator[StepBatch | str]:
        """Endless; a DataError ends it and comes out as its text, so that all ranks can agree."""
        info = get_worker_info()
        mine = sorted(self.states)
        if info is not None:
            torch.set_num_threads(1)
            _heed_signals_of_the_rank_alone()
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
        told = [t.told for t in taken if t.told is not None]
        skipped = []
        for reader in readers.values():
            skipped += reader.skipped
            reader.skipped = []
        return StepBatch(
            # as the pictures lie in memory: stacking without transposing
            images=torch.stack([t.pixels.permute(1, 2, 0) for t in taken]).permute(0, 3, 1, 2),
            tokens=torch.stack([t.tokens for t in taken]),
            told=torch.stack(told) if told else None,
            keys=[t.key for t in taken],
            share_indices=torch.arange(len(taken)),
            lanes={lane: reader.position for lane, reader in readers.items()},
            skipped=skipped,
        )


class TrainLoader:
    """Iterates over this rank's share of every step."""

    def __init__(
        self, dataset: TrainDataset, workers: int, arrange: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """`arrange` orders a share, from its token counts int64 [n] to a permutation int64 [n]."""
        self._arrange = arrange
        self._pad_id = dataset.tokenizer.pad_id
        self._workers = min(workers, len(dataset.states))
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=self._workers,
            persistent_workers=self._workers > 0,
            # children of this process, which their signals rely on, whatever is Python's default
            multiprocessing_context="fork" if self._workers else None,
        )

    def __iter__(self) -> Generator[StepBatch]:
        """Endless, until it is closed; loader processes start here, as copies of this one.

        Raises:
            DataError: from `next`, if the data cannot be used.
        """
        return self._steps(iter(self._loader))

    def _steps(self, pieces: Iterator[StepBatch | str]) -> Generator[StepBatch]:
        while True:
            step = []
            for _ in range(max(1, self._workers)):
                piece = next(pieces)
                if isinstance(piece, str):
                    raise DataError(piece)
                step.append(piece)
            batch = _join(step)
            if self._arrange is not None:
                lengths = (batch.tokens != self._pad_id).sum(1)
                batch = _arranged(batch, self._arrange(lengths))
            yield batch


def _heed_signals_of_the_rank_alone() -> None:
    """The cluster and the terminal signal every process and mean the ranks, who need their workers.

    A rank ends a worker with SIGTERM too, one that is stuck in a read when the run is over. One
    whose rank is gone ends by itself.
    """
    rank = os.getppid()
    numbers = {signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # of all threads that start from here

    def wait() -> None:
        while os.getppid() == rank:
            caught = signal.sigtimedwait(numbers, LOOK_SECONDS)
            if caught and caught.si_signo == signal.SIGTERM and caught.si_pid == rank:
                break
        os._exit(0)

    threading.Thread(target=wait, name="signals", daemon=True).start()


def _join(pieces: Sequence[StepBatch]) -> StepBatch:
    if len(pieces) == 1:
        return pieces[0]
    told = [p.told for p in pieces if p.told is not None]
    return StepBatch(
        images=torch.cat([p.images for p in pieces]),
        tokens=torch.cat([p.tokens for p in pieces]),
        told=torch.cat(told) if told else None,
        keys=[key for p in pieces for key in p.keys],
        share_indices=torch.arange(sum(len(p.keys) for p in pieces)),
        lanes={lane: position for p in pieces for lane, position in p.lanes.items()},
        skipped=[bad for p in pieces for bad in p.skipped],
    )


def _arranged(batch: StepBatch, order: Tensor) -> StepBatch:
    return replace(
        batch,
        # channels stay last in memory, as they came
        images=batch.images.permute(0, 2, 3, 1)[order].permute(0, 3, 1, 2),
        tokens=batch.tokens[order],
        told=None if batch.told is None else batch.told[order],
        keys=[batch.keys[i] for i in order.tolist()],
        share_indices=batch.share_indices[order],
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
    if saved is not None and any(len(position) != len(Position()) for position in saved):
        raise DataError("the checkpoint's sample positions are of another version of coca-scale")
    mine = range(rank * lanes // ranks, (rank + 1) * lanes // ranks)
    return {lane: Position(*saved[lane]) if saved is not None else Position() for lane in mine}
