"""What runs and commands have written as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def lines_of(file: Path) -> list[dict[str, Any]]:
    """All lines of a file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def curve(run: Path, steps: int | None = None) -> list[tuple[float, float, float]]:
    """Loss, gradient norm and logit scale of every step, each of which must be there once.

    Args:
        run: its folder.
        steps: how many there must be, None if that is open.
    """
    lines = lines_of(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, (steps or len(lines)) + 1))
    return [(line["loss"], line["grad_norm"], line["logit_scale"]) for line in lines]
