"""What happens to a run from outside: its starts, saves, failures and ends, a line of JSON each.

Unlike the other logs of a run folder this one keeps what a resume goes back behind.
"""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from coca_scale.errors import UserError
from coca_scale.recipe.files import readable_lines
from coca_scale.recipe.run_folder import EVENTS, METRICS
from coca_scale.training.appending import append

Event = Literal["start", "save", "failure", "end"]
_LAST_BYTES = 2**16


def append_event(folder: Path, event: Event, **values: Any) -> None:
    """Add a line to a run folder's events; a disk that refuses it costs a warning.

    Args:
        folder: of the run.
        event: what happened.
        values: about it, as JSON has them.
    """
    line = {"time": now(), "event": event, **values}
    append(folder / EVENTS, json.dumps(line) + "\n")


def now() -> str:
    """The time as lines of a run's files have it: ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


class Logged(BaseModel):
    """A line of metrics.jsonl, as far as events tell of it: its step, and when it was written."""

    step: int
    time: str


def last_logged(folder: Path) -> dict[str, Any] | None:
    """How far a run folder's metrics go, before a resume drops what it goes back behind."""
    try:
        lines = [*readable_lines(folder / METRICS, Logged, _LAST_BYTES)]
    except (OSError, UserError):
        return None
    known = [line for line in lines if line is not None]
    return known[-1].model_dump() if known else None


def job_of_slurm() -> dict[str, Any]:
    """Which start of which job this is; nothing outside SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return {}
    return {"job": job, "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}
