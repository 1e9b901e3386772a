"""Lines of a run's files: added, and taken back where a run goes on from an earlier step.

Neither a full disk nor a damaged line must end a run for the sake of its log.
"""

from __future__ import annotations

import os
from io import RawIOBase
from pathlib import Path

from coca_scale.errors import UserError
from coca_scale.recipe.files import parse_json, without_waiting
from coca_scale.recipe.text import tell
from coca_scale.recipe.whole_files import whole_file

_failed: set[Path] = set()


def append(path: Path, text: str) -> None:
    """Add `text` to a file; if not all of it can be written, say so once and drop it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0, opener=without_waiting) as file:
            before = file.tell()
            try:
                _write_all(file, text.encode())
            except OSError:
                file.truncate(before)  # half a line would spoil the next one
                raise
    except OSError as error:
        warn_once(path, error)
    else:
        _failed.discard(path)


def _write_all(file: RawIOBase, content: bytes) -> None:
    while content:
        content = content[file.write(content) or 0 :]


def warn_once(path: Path, error: OSError) -> None:
    """Say that lines of a file are lost, at the first one."""
    if path not in _failed:
        _failed.add(path)
        tell(f"warning: {path} is not being written: {error}")


def forget_after(path: Path, step: int) -> str | None:
    """Drop lines of later steps, and a last line that a killed run did not finish.

    Returns:
        What is to be said if whole lines that cannot be read were dropped as well.
    """
    if not path.is_file():
        return None
    unreadable = scattered = end = at = 0
    with path.open("rb") as lines:
        for line in lines:
            at += len(line)
            found = _step_of(line)
            if found is not None and found <= step:
                scattered += end + len(line) != at  # something before it goes
                end = at
            unreadable += found is None and line.endswith(b"\n")
    try:
        if scattered:
            _rewrite(path, step)
        elif end < at:
            os.truncate(path, end)  # needs no room
    except OSError as error:
        warn_once(path, error)
        return None
    if unreadable:
        lines_are = "line is" if unreadable == 1 else "lines are"
        return f"warning: {path}: {unreadable} damaged {lines_are} left out"
    return None


def _rewrite(path: Path, step: int) -> None:
    with path.open("rb") as lines, whole_file(path) as kept:
        for line in lines:
            found = _step_of(line)
            if found is not None and found <= step:
                kept.write(line)


def _step_of(line: bytes) -> int | None:
    """The step that a whole line is about; None if it cannot be read."""
    if not line.endswith(b"\n"):
        return None
    try:
        content = parse_json(line, "line")
    except UserError:
        return None
    step = content.get("step") if isinstance(content, dict) else None
    return step if isinstance(step, int) else None
