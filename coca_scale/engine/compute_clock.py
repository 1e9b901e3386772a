"""How long this rank's device computes, without what it waits for: that tells whose device is slow.

Inside a step all devices are as fast as the slowest: the others wait for it in collectives. So time
is taken around layers only, behind the wait for their weights, by events on the stream that
computes; they are read when the step is through anyway, and nobody waits for them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from coca_scale.engine.config import gathered_whole, layers

Moment = Any  # an event of the stream that computes, or seconds of the host's clock


class Spans:
    """From where to where layers computed in a step."""

    def __init__(self) -> None:
        self._spans: list[tuple[Moment, Moment]] = []

    def add(self, begin: Moment, end: Moment) -> None:
        """One more layer."""
        self._spans.append((begin, end))

    def seconds(self) -> float | None:
        """Of all together, of a step that the device is through with; None if none was timed."""
        return sum(_seconds(*span) for span in self._spans) if self._spans else None


class ComputeClock:
    """Times layers in the steps that are to be timed."""

    def __init__(self, timed: Iterable[nn.Module], device: torch.device) -> None:
        """Hooks come in the order in which they are made: those that gather weights are there.

        Args:
            timed: layers of a sharded model, none inside another.
            device: where they compute.
        """
        self._on_gpu = device.type == "cuda"
        self._spans: Spans | None = None
        self._begun: Moment | None = None
        for layer in timed:
            layer.register_forward_pre_hook(self._begin)
            layer.register_forward_hook(self._end)

    @contextmanager
    def timing(self, wanted: bool) -> Iterator[Spans]:
        """Layers that run inside are timed if that is wanted."""
        spans = Spans()
        self._spans = spans if wanted else None
        yield spans
        self._spans = self._begun = None

    def _begin(self, *_: Any) -> None:
        if self._spans is not None:
            self._begun = self._now()

    def _end(self, *_: Any) -> None:
        # a layer that is computed once more for the backward pass may begin and not end
        if self._spans is not None and self._begun is not None:
            self._spans.add(self._begun, self._now())
            self._begun = None

    def _now(self) -> Moment:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def equal_layers(model: nn.Module, zero_stage: int) -> list[nn.Module]:
    """Layers that wait for nobody in a forward pass, and have the same work on every rank.

    Those of the image tower: captions have lengths. Where ZeRO-3 gathers weights inside of layers,
    as where some are locked, there are none.

    Args:
        model: a CoCa, sharded.
        zero_stage: of the engine that shards it.
    """
    waiting = zero_stage == 3 and not gathered_whole(model)
    return [] if waiting else layers(model.get_submodule("image"))


def _seconds(begin: Moment, end: Moment) -> float:
    on_gpu = isinstance(begin, torch.cuda.Event)
    return begin.elapsed_time(end) / 1000 if on_gpu else end - begin
