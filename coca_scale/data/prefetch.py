"""The next step's batch on the device while this one computes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from coca_scale.data.loader import StepBatch


class Prefetcher:
    """Takes one batch ahead, in a thread.

    The thread puts the loader's pieces together and, for a GPU, copies images from pinned memory on
    a stream of its own; tokens stay on the host, which lays them out. Positions travel with the
    batch, so one that was fetched and not used is read again after a resume.
    """

    def __init__(self, batches: Iterator[StepBatch], device: torch.device) -> None:
        self._batches = batches
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "prefetch")
        self._next: Future[StepBatch] = self._thread.submit(self._fetch)

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        """The next batch; whatever the loader raised is raised here."""
        batch = self._next.result()
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            batch.images.record_stream(current)
        self._next = self._thread.submit(self._fetch)
        return batch

    def close(self) -> None:
        """Wait for what is on its way, and drop it."""
        self._next.cancel()
        self._thread.shutdown()

    def _fetch(self) -> StepBatch:
        batch = next(self._batches)
        if self._stream is None:
            return batch
        with torch.cuda.stream(self._stream):
            images = batch.images.pin_memory().to(self._device, non_blocking=True)
        return replace(batch, images=images)
