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
from typing import NamedTuple

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
from coca_scale.model.targets import Targets
from coca_scale.recipe import Recipe

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
        targets: what is to be written, where that is not always the same; of the same T.
        told: what a teacher is told of the samples, [n, …]; None where it is `tokens`, or nobody.
        keys: sample names.
        share_indices: int64 [n], index of each sample in this share before it was arranged.
        lanes: where each of this rank's lanes stands once this batch has been used.
        skipped: samples left out on the way here, by fault or by filter.
    """

    images: Tensor
    tokens: Tensor
    targets: Targets | None
    told: Tensor | None
    keys: list[str]
    share_indices: Tensor
    lanes: LaneStates
    skipped: list[Skipped]


@dataclass(frozen=True)
class Draws:
    """What is drawn of a sample's captions.

    Attributes:
        match: whether one is drawn to be matched; else that to be written is for both.
        write: whether one is drawn to be written; else that to be matched is for both.
        parallel: share of samples whose caption is predicted in parallel.
    """

    match: bool = True
    write: bool = True
    parallel: float = 0.0

    @classmethod
    def of(cls, recipe: Recipe) -> Draws:
        """As a recipe has it; a loss of weight 0 has no caption of its own."""
        loss = recipe.loss
        match = loss.learns("contrastive", "distill", "distill_features")
        write = loss.learns("caption")
        return cls(match, write, loss.caption_parallel if write else 0.0)


EVERY = Draws()


class Decoded(NamedTuple):
    """A training sample.

    Attributes:
        pixels: uint8 [3, size, size].
        tokens: int64 [T], of the caption that is matched.
        caption: which that is.
        target: int64 [T], of that which is written; None where it is the same.
        parallel: whether that is predicted in parallel.
    """

    pixels: Tensor
    tokens: Tensor
    caption: str
    target: Tensor | None = None
    parallel: bool = False


def decode_sample(
    sample: RawSample,
    tokenizer: Tokenizer,
    crop: TrainCrop,
    rng: np.random.Generator,
    draws: Draws = EVERY,
) -> Decoded:
    """A training sample of a raw one.

    Args:
        sample: the raw sample; of its captions one is drawn, or one for each loss.
        tokenizer: cuts captions that are longer than the context, keeping the end token.
        crop: how the picture is cropped.
        rng: draws captions, crop and what is predicted in parallel.
        draws: what is drawn of captions.

    Raises:
        BadSample: the image cannot be used or is filtered out, or the caption has no words.
    """
    if not sample.caption or sample.targets == ():
        raise BadSample("empty_caption", sample.key)
    targets = sample.targets if draws.write else None
    first = sample.captions if draws.match or targets is None else targets
    caption = _drawn(first, rng)
    pixels = train_pixels(sample.image, sample.key, crop, rng)
    target = None if targets is None or not draws.match else tokenizer([_drawn(targets, rng)])[0]
    parallel = draws.parallel > 0 and bool(rng.random() < draws.parallel)
    return Decoded(pixels, tokenizer([caption])[0], caption, target, parallel)


def _drawn(captions: Sequence[tuple[str, float]], rng: np.random.Generator) -> str:
    if len(captions) == 1:
        return captions[0][0]
    weights = np.cumsum([weight for _, weight in captions])
    drawn = np.searchsorted(weights, rng.uniform(0.0, weights[-1]), side="right")
    return captions[min(int(drawn), len(weights) - 1)][0]


class _Taken(NamedTuple):
    """A good sample, ready to be stacked."""

    key: str
    sample: Decoded
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
                    decoded = decode_sample(sample, d.tokenizer, d.crop, rng, d.draws)
                    told = None if d.tell is None else d.tell(sample, decoded.caption)
                except BadSample as bad:
                    skipped = bad.skipped
                    if isinstance(sample, RawSample):
                        skipped = skipped._replace(shard=sample.shard)
                    self.skipped.append(skipped)
                    causes[skipped.cause] += skipped.lost
                    continue
                good = True
                yield _Taken(sample.key, decoded, told)
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
    draws: Draws = EVERY
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
        samples = [t.sample for t in taken]
        return StepBatch(
            # as the pictures lie in memory: stacking without transposing
            images=torch.stack([s.pixels.permute(1, 2, 0) for s in samples]).permute(0, 3, 1, 2),
            tokens=torch.stack([s.tokens for s in samples]),
            targets=_targets(samples, self.draws.parallel > 0),
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
                if batch.targets is not None:
                    more = (batch.targets.tokens_BT != self._pad_id).sum(1)
                    lengths += more * batch.targets.separate(batch.tokens)
                batch = _arranged(batch, self._arrange(lengths))
            yield batch


def _targets(samples: Sequence[Decoded], parallel: bool) -> Targets | None:
    """What is to be written, where that is not what is matched, or some of it in parallel."""
    if not parallel and all(sample.target is None for sample in samples):
        return None
    tokens = [sample.tokens if sample.target is None else sample.target for sample in samples]
    chosen = torch.tensor([sample.parallel for sample in samples]) if parallel else None
    return Targets(torch.stack(tokens), chosen)


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
        targets=Targets.cat([p.targets for p in pieces]),
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
        targets=None if batch.targets is None else batch.targets[order],
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
