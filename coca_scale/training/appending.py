"""Lines added to a run's files; a full disk must not end the run for the sake of its log."""

from __future__ import annotations

import sys
from pathlib import Path

_failed: set[Path] = set()


def append(path: Path, text: str) -> None:
    """Add `text` to a file; if it cannot be written, say so once and drop it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(text)
    except OSError as error:
        warn_once(path, error)
    else:
        _failed.discard(path)


def warn_once(path: Path, error: OSError) -> None:
    """Say that lines of a file are lost, at the first one."""
    if path not in _failed:
        _failed.add(path)
        print(f"warning: {path} is not being written: {error}", file=sys.stderr, flush=True)
