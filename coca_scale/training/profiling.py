"""Where the time of a few steps goes, by torch.profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from coca_scale.recipe.whole_files import write_whole


class StepProfiler:
    """Records the steps a recipe names; a context, so that what was begun is written."""

    def __init__(
        self, span: Sequence[int] | None, folder: Path, say: Callable[[str], None]
    ) -> None:
        """Record nothing yet.

        Args:
            span: the first and the last step, counted from 1; None records nothing.
            folder: where a table and a trace go.
            say: takes the line that names them.
        """
        self._span = span
        self._folder = folder
        self._say = say
        self._recording: profile | None = None

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._write()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step; a run that resumes inside the span records the rest of it."""
        if self._span is None or not self._span[0] <= number <= self._span[1]:
            yield
            return
        if self._recording is None:
            kinds = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                kinds.append(ProfilerActivity.CUDA)
            self._recording = profile(activities=kinds)
            self._recording.start()
        with record_function(f"ProfilerStep#{number}"):  # the name that tools look for
            yield
        if number == self._span[1]:
            self._write()

    def _write(self) -> None:
        if self._recording is None:
            return
        recording, self._recording = self._recording, None
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the last step was only begun
        recording.stop()
        key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        try:
            table = recording.key_averages().table(sort_by=key, row_limit=30)
            write_whole(self._folder / "operators.txt", table)
            recording.export_chrome_trace(str(self._folder / "trace.json.gz"))
        except OSError as error:
            self._say(f"the profile could not be written: {error}")
            return
        self._say(f"profile in {self._folder}: operators.txt, trace.json.gz (ui.perfetto.dev)")
