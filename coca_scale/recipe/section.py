"""What the sections of a recipe have in common."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

_SWITCHES = {"yes": True, "on": True, "no": False, "off": False}
_GROUPED = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?")
_HOME = re.compile(r"~[^/{},]*")


def with_home(place: str) -> str:
    """A path with `~` and `~user` written out, at its start or that of each choice in braces.

    Addresses and `pipe:` commands do not start like that, and stay.
    """
    if place.startswith("{"):
        return re.sub(rf"(?<=[{{,]){_HOME.pattern}(?=[/,}}])", _home, place)
    return _HOME.sub(_home, place, count=1) if place.startswith("~") else place


def _home(found: re.Match[str]) -> str:
    try:
        return str(Path(found[0]).expanduser())
    except RuntimeError:  # nobody's
        return found[0]


LARGEST_INT = 2**31 - 1
MAX_STEPS = 10**8 - 1  # checkpoints are named with eight digits
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST_INT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST_INT)]
SampleCount = Annotated[int, Field(ge=1, le=2**53)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Minutes = Annotated[float, Field(gt=0.0, le=1e6)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PathText = Annotated[str, AfterValidator(with_home)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, and nothing is converted silently."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _spelt_as_before(cls, value: object, about: ValidationInfo) -> object:
        """`off` and `1_000` are text in YAML 1.2; where no text can be meant they say what they
        say to people."""
        assert about.field_name is not None
        return _as_meant(value, cls.model_fields[about.field_name].annotation)


def _as_meant(value: object, kind: Any) -> object:
    kinds = list(_members(kind))
    inner = {get_origin(member): get_args(member) for member in kinds}
    if isinstance(value, list):
        items = Any if Any in kinds else inner.get(list, (str,))[0]
        return [_as_meant(item, items) for item in value]
    if isinstance(value, dict):
        items = Any if Any in kinds else inner.get(dict, (str, str))[1]
        return {key: _as_meant(item, items) for key, item in value.items()}
    if not isinstance(value, str) or str in kinds:
        return value
    if (bool in kinds or Any in kinds) and value.lower() in _SWITCHES:
        return _SWITCHES[value.lower()]
    if {int, float, Any} & set(kinds) and "_" in value and _GROUPED.fullmatch(value):
        plain = value.replace("_", "")
        return int(plain) if plain.lstrip("-+").isdigit() else float(plain)
    return value


def _members(kind: Any) -> Iterator[Any]:
    """The types that a value may have."""
    origin = get_origin(kind)
    if origin is Annotated:
        yield from _members(get_args(kind)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(kind):
            yield from _members(member)
    elif origin is Literal:
        yield from {type(choice) for choice in get_args(kind)}
    else:
        yield kind
