"""Weights of losses: numbers, or points over the run between which they move in straight lines.

What a weight is in a step follows from the number of that step and the length of the run alone, so
that it is the same on every rank and after every resume.
"""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

# steps that were made before, or the share of the run that they are
POSITION = re.compile(r"[0-9]{1,8}|(?:100|[0-9]{1,2}(?:\.[0-9]{1,6})?)%")
Factor = Annotated[float, Field(ge=0.0)]


def _texts(value: Any) -> Any:
    """Keys as JSON has them; in YAML those of steps are numbers."""
    if not isinstance(value, dict):
        return value
    return {_text(key): factor for key, factor in value.items()}


def _text(key: Any) -> Any:
    return key.replace("_", "") if isinstance(key, str) else str(key)


def _in_order(points: dict[str, float]) -> dict[str, float]:
    if not points:
        raise ValueError("points of a weight, such as {0: 0.0, 1000: 2.0}, are missing")
    wrong = [key for key in points if not POSITION.fullmatch(key)]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is neither a number of steps nor a share of the run in %")
    if len({key.endswith("%") for key in points if float(key.rstrip("%"))}) > 1:
        raise ValueError("its points are in steps or in %, not in both")
    ordered = sorted(points, key=_number)
    for one, next_one in itertools.pairwise(ordered):
        if _number(one) == _number(next_one):
            raise ValueError(f"{one!r} and {next_one!r} are the same point")
    return {key: points[key] for key in ordered}


_Points = Annotated[dict[str, Factor], BeforeValidator(_texts), AfterValidator(_in_order)]
LossWeight = Annotated[
    Annotated[Factor, Tag("number")] | Annotated[_Points, Tag("points")],
    Discriminator(lambda value: "points" if isinstance(value, dict) else "number"),
]


def weight_at(weight: float | dict[str, float], step: int, steps: int) -> float:
    """A weight in step `step` (from 0) of `steps`; before its first point and behind its last one
    it is as there."""
    if not isinstance(weight, dict):
        return float(weight)
    points = [(_place(key, steps), factor) for key, factor in weight.items()]
    if step < points[0][0]:
        return points[0][1]
    for (begin, factor), (end, next_factor) in itertools.pairwise(points):
        if step < end:
            return factor + (next_factor - factor) * ((step - begin) / (end - begin))
    return points[-1][1]


def factors(weight: float | dict[str, float]) -> list[float]:
    """Of all points; a number is one."""
    return list(weight.values()) if isinstance(weight, dict) else [float(weight)]


def _number(key: str) -> float:
    return float(key.rstrip("%"))


def _place(key: str, steps: int) -> float:
    return _number(key) * steps / 100 if key.endswith("%") else int(key)
