"""What a job prints to: a run does not end because nobody reads it any more."""

from __future__ import annotations

import io
import sys
from typing import Any, TextIO


def outlive_readers() -> None:
    """Let stdout and stderr drop what cannot be written, as to a closed terminal.

    Ctrl-C ends the `tee` behind a pipe as well, before the ranks have saved.
    """
    sys.stdout, sys.stderr = _outliving(sys.stdout), _outliving(sys.stderr)


def _outliving(stream: TextIO) -> TextIO:
    stream.flush()
    file = io.BufferedWriter(_Outliving(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(
        file, encoding=stream.encoding, errors="backslashreplace", line_buffering=True
    )


class _Outliving(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(memoryview(data).cast("B"))
