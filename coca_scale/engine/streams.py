"""What a job prints to: a run does not end because nobody reads it any more."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, TextIO


def outlive_readers() -> None:
    """Let stdout and stderr drop what cannot be written, as to a closed terminal.

    Ctrl-C ends the `tee` behind a pipe as well, before the ranks have saved. Where there is none,
    as after `>&-`, its number goes to nowhere: a file opened next would get it, and what C++ and
    other programs print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    sys.stdout, sys.stderr = _outliving(sys.stdout, 1), _outliving(sys.stderr, 2)


def _outliving(stream: TextIO | None, number: int) -> TextIO:
    encoding = "utf-8"
    if stream is not None:
        stream.flush()
        encoding, number = stream.encoding, stream.fileno()
    file = io.BufferedWriter(_Outliving(number, "w", closefd=False))
    return io.TextIOWrapper(file, encoding=encoding, errors="backslashreplace", line_buffering=True)


class _Outliving(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(memoryview(data).cast("B"))
