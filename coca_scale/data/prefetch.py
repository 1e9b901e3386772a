"""The next step's batch on the device while this one computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coca_scale.data.loader import StepBatch
from coca_scale.model.packing import Lesson, PackedCaptions, sent
from coca_scale.model.targets import Targets

LayOut = Callable[[Tensor, Targets | None], list[PackedCaptions]]
LayOutLesson = Callable[[Tensor], list[Lesson]]


@dataclass(frozen=True)
class ReadyBatch:
    """One rank's share of an optimizer step, as the engine takes it.

    Attributes:
        share: as the loader put it together, with images on the device.
        captions: its tokens laid out, one entry for each micro-batch, on the device.
        lesson: what a teacher takes of it, likewise; empty without a teacher.
    """

    share: StepBatch
    captions: list[PackedCaptions]
    lesson: list[Lesson]


class Prefetcher:
    """Takes one batch ahead, in a thread.

    The thread puts the loader's pieces together, lays captions out on the host, whose lengths it
    has to read, and for a GPU copies everything from pinned memory on a stream of its own.
    Positions travel with the batch, so one that was fetched and not used is read again after a
    resume.
    """

    def __init__(
        self,
        batches: Iterator[StepBatch],
        lay_out: LayOut,
        device: torch.device,
        lay_out_lesson: LayOutLesson = lambda _: [],
    ) -> None:
        """Begin with the first batch.

        Args:
            batches: of the loader.
            lay_out: from token ids int64 [n, T] on the host, and targets, to captions on the
                device.
            device: of this rank.
            lay_out_lesson: likewise, from what a batch brings for a teacher.
        """
        self._batches = batches
        self._lay_out, self._lay_out_lesson = lay_out, lay_out_lesson
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._next: Future[ReadyBatch] = self._thread.submit(self._fetch)

    def __iter__(self) -> Iterator[ReadyBatch]:
        return self

    def __next__(self) -> ReadyBatch:
        """The next batch; whatever the loader raised is raised here."""
        batch = self._next.result()
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)

            def used_here(tensor: Tensor) -> Tensor:
                tensor.record_stream(current)
                return tensor

            used_here(batch.share.images)
            for captions in batch.captions:
                captions.map(used_here)
            for part in batch.lesson:
                used_here(part) if isinstance(part, Tensor) else part.map(used_here)
        self._next = self._thread.submit(self._fetch)
        return batch

    def close(self) -> None:
        """Wait for what is on its way, and drop it."""
        self._next.cancel()
        self._thread.shutdown()

    def _fetch(self) -> ReadyBatch:
        batch = next(self._batches)
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            share = replace(batch, images=sent(batch.images, self._device))
            told = batch.tokens if batch.told is None else batch.told
            captions = self._lay_out(batch.tokens, batch.targets)
            return ReadyBatch(share, captions, self._lay_out_lesson(told))
