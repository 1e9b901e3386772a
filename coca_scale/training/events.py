"""What happens to a run from outside: its starts, saves, failures and ends, a line of JSON each.

Unlike the other logs of a run folder this one keeps what a resume goes back behind.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from coca_scale.errors import UserError
from coca_scale.recipe.files import readable_lines
from coca_scale.recipe.lock import start_of_job
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


def start_of_slurm() -> dict[str, Any]:
    """Which start of which job this is; nothing outside SLURM.

    A start is counted by SLURM's requeues, and by those in the same allocation since the last.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return {}
    restart, launch = start_of_job()
    return {"job": job, "restart": restart, "launch": launch}


def job_of_slurm() -> dict[str, Any]:
    """Which start of which job this is, and why `slurm/launch.sh` made it if it came after one."""
    why = os.environ.get("COCA_SCALE_WHY")
    return start_of_slurm() | ({"why": why} if why else {})


def append_failure(folder: Path, at_fault: Mapping[int, str | None], told: str) -> None:
    """Add what has ended the ranks; a node is named if it alone is at fault.

    Args:
        folder: of the run.
        at_fault: nodes of the ranks at fault, as far as they are known.
        told: the message, perhaps with a traceback.
    """
    ranks, nodes = [*at_fault], {*at_fault.values()}
    first, *rest = told.splitlines()
    append_event(
        folder,
        "failure",
        **start_of_slurm(),
        rank=ranks[0] if len(ranks) == 1 else None,
        host=nodes.pop() if len(nodes) == 1 else None,
        what=f"{first} {rest[-1]}" if rest and first.endswith(":") else first,
    )
