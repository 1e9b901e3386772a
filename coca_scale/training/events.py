"""What happens to a run from outside: its starts, saves, failures and ends, a line of JSON each.

Unlike the other logs of a run folder this one keeps what a resume goes back behind.
"""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from coca_scale.recipe.run_folder import EVENTS
from coca_scale.training.appending import append

Event = Literal["start", "save", "failure", "end"]


def append_event(folder: Path, event: Event, **values: Any) -> None:
    """Add a line to a run folder's events; a disk that refuses it costs a warning.

    Args:
        folder: of the run.
        event: what happened.
        values: about it, as JSON has them.
    """
    line = {
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "event": event,
        **values,
    }
    append(folder / EVENTS, json.dumps(line) + "\n")


def job_of_slurm() -> dict[str, Any]:
    """Which start of which job this is; nothing outside SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return {}
    return {"job": job, "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0"))}
