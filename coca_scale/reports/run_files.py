"""What the files of a run say while they are written, and after disks have damaged them.

Of what grows with a run only the end is read. A value of a wrong kind is as one that is not there.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from coca_scale.errors import UserError
from coca_scale.recipe.files import open_regular, readable_lines
from coca_scale.recipe.lock import WATCH_SECONDS, Seen, last_seen, run_claim
from coca_scale.recipe.run_folder import (
    BAD_STEPS,
    CHECKPOINTS,
    EVENTS,
    LATEST,
    METRICS,
    VALIDATION,
)
from coca_scale.recipe.section import MAX_STEPS

LAST_BYTES = 2**20  # of a file
LARGEST = 1e300  # sums of smaller numbers are finite
LONGEST = 300  # characters of a text


class Line(BaseModel):
    """A line about a step, with whatever else it says."""

    model_config = ConfigDict(extra="allow")

    step: Annotated[StrictInt, Field(ge=0, le=MAX_STEPS)]

    def get(self, name: str) -> Any:
        """What it says of anything; None if it does not."""
        return (self.model_extra or {}).get(name)

    def number(self, name: str) -> float | None:
        """A finite number."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return float(value) if abs(value) < LARGEST else None

    def whole(self, name: str) -> int | None:
        """A whole number."""
        value = self.number(name)
        return int(value) if value is not None and value == int(value) else None

    def text(self, name: str) -> str | None:
        """A text that is not empty, or its beginning."""
        value = self.get(name)
        return value[:LONGEST] if isinstance(value, str) and value else None

    @property
    def losses(self) -> list[str]:
        """Names of the losses in it, that of their sum first."""
        names = (n for n in self.model_extra or {} if n == "loss" or n.endswith("_loss"))
        return sorted(names, key=lambda name: name != "loss")

    @property
    def seconds(self) -> float | None:
        """When it was written, in seconds since 1970."""
        return seconds_of(self.get("time"))


class Event(Line):
    """A line of events.jsonl; who tells of a failure may not know the step."""

    step: Annotated[StrictInt, Field(ge=0, le=MAX_STEPS)] = 0
    event: Literal["start", "save", "failure", "end"]


@dataclass(frozen=True)
class RunFiles:
    """Lines from the ends of a run's files.

    Attributes:
        metrics: of metrics.jsonl.
        events: of events.jsonl.
        validation: of validation.jsonl.
        bad_steps: of bad_steps.jsonl.
        checkpoint: name of the newest one.
        written: when metrics.jsonl was, in seconds since 1970.
        damaged: lines that cannot be read.
    """

    metrics: list[Line]
    events: list[Event]
    validation: list[Line]
    bad_steps: list[Line]
    checkpoint: str | None
    written: float | None
    damaged: int

    @classmethod
    def of(cls, folder: Path) -> RunFiles:
        """Read a run folder's; one that is not there has no lines."""
        names = (METRICS, EVENTS, VALIDATION, BAD_STEPS)
        found = [_lines(folder / name, Event if name == EVENTS else Line) for name in names]
        metrics, events, validation, bad_steps = (
            [line for line in lines if line is not None] for lines in found
        )
        written = None
        with suppress(OSError):
            written = (folder / METRICS).stat().st_mtime
        return cls(
            metrics=metrics,
            events=[event for event in events if isinstance(event, Event)],
            validation=validation,
            bad_steps=bad_steps,
            checkpoint=_checkpoint(folder),
            written=written,
            damaged=sum(lines.count(None) for lines in found),
        )


class Pulse:
    """Whether the owner of a run folder lives, by its lock file.

    From one look to the next its time changes, whatever the clocks of two machines say; at the
    first look its age has to do.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._changed: int | None = None
        self._beat = -math.inf

    def look(self, now: float, running: float) -> tuple[Seen | None, bool]:
        """What is there, and whether it lives.

        Args:
            now: seconds since 1970, by this machine.
            running: seconds of a clock that nobody sets.
        """
        try:
            seen = last_seen(run_claim(self._folder))
        except (OSError, UserError):
            seen = None
        if seen is None or seen.released or seen.dead:
            return seen, False
        if self._changed is None:
            self._beat = running - max(0.0, now - seen.changed / 1e9)
        elif self._changed != seen.changed:
            self._beat = running
        self._changed = seen.changed
        return seen, running - self._beat < WATCH_SECONDS


def seconds_of(time: Any) -> float | None:
    """Seconds since 1970 of a time as lines have it, ISO 8601; None if it is none."""
    if not isinstance(time, str):
        return None
    try:
        found = datetime.fromisoformat(time.replace("Z", "+00:00"))
        known = found.tzinfo is not None and 1970 < found.year < 9999
        return found.timestamp() if known else None
    except ValueError:
        return None


def iso(seconds: float) -> str:
    """The other way."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")


def _lines(path: Path, kind: type[Line]) -> list[Line | None]:
    try:
        return [*readable_lines(path, kind, LAST_BYTES)]
    except (OSError, UserError):  # it is not there, or is something else than a file
        return []


def _checkpoint(folder: Path) -> str | None:
    with suppress(OSError, UserError), open_regular(folder / CHECKPOINTS / LATEST) as file:
        return file.read(100).decode("utf-8", "replace").strip() or None
    return None
