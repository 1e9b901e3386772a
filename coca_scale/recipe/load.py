"""Read a recipe: YAML, `key.path=value` overrides, validation with readable messages."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from coca_scale.errors import UserError
from coca_scale.recipe.data import WeightedShards
from coca_scale.recipe.files import read_text
from coca_scale.recipe.schema import LENGTH_KEYS, Recipe
from coca_scale.recipe.yaml_text import complaint, dump_yaml, parse_yaml


class RecipeError(UserError):
    """A recipe that cannot be used; the message lists every fault, one per line."""


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read the recipe at `path` and apply `key.path=value` overrides.

    Raises:
        RecipeError: missing or malformed file, unknown key, wrong type or value out of range.
    """
    path = Path(path)
    raw = read_sections(path)
    for override in overrides:
        apply_override(raw, override)
    return recipe_from_dict(raw, str(path))


def read_sections(path: Path) -> dict[str, Any]:
    """The sections of a recipe file as they stand there, not looked at.

    Raises:
        RecipeError: no such file, or not a YAML mapping.
    """
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe; the shipped ones are in recipes/")
    try:
        raw = parse_yaml(read_text(path))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not readable as YAML: {complaint(error)}") from error
    except (UserError, OSError) as error:
        raise RecipeError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, this is {_kind(raw)}")
    return raw


def recipe_from_dict(raw: Mapping[str, Any], origin: str = "recipe") -> Recipe:
    """Validate a recipe given as plain data.

    Raises:
        RecipeError: every fault on a line of its own, each with its key path.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        lines = [f"{origin}: {_describe(fault)}" for fault in error.errors()]
        raise RecipeError("\n".join(lines)) from error


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set `key.path=value` in `raw`; the value is read as YAML.

    Overriding one of train.steps, train.samples, train.epochs removes the other two, and
    overriding schedule.stages all three. Items of a list have numbers: schedule.stages.0.steps=9.

    Raises:
        RecipeError: not of the form key.path=value, or of no item that is there.
    """
    path, separator, text = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        raise RecipeError(f"override {override!r}: write it as key.path=value")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"override {override!r}: the value is not readable as YAML ({complaint(error)}); "
            "text with braces, brackets or colons goes in quotes of its own"
        ) from error
    node: Any = raw
    for key, inner in itertools.pairwise(keys):
        child = node.setdefault(key, {}) if isinstance(node, dict) else node[int(key)]
        if isinstance(child, list):
            if not (inner.isdecimal() and int(inner) < len(child)):
                raise RecipeError(
                    f"override {override!r}: {key} has items 0 to {len(child) - 1}, not {inner}"
                )
        elif not isinstance(child, dict):
            raise RecipeError(f"override {override!r}: {key} is a value, not a section")
        node = child
    node[keys[-1] if isinstance(node, dict) else int(keys[-1])] = value
    _drop_other_lengths(raw, path, value)


def _drop_other_lengths(raw: Mapping[str, Any], path: str, value: Any) -> None:
    """An override of the run's length is the length, whatever else the recipe says."""
    section, _, key = path.partition(".")
    stages = path == "schedule.stages" and value
    train = raw.get("train")
    if isinstance(train, dict) and (
        stages or (section == "train" and key in LENGTH_KEYS and value is not None)
    ):
        for other in LENGTH_KEYS:
            if other != key:
                train.pop(other, None)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; loading it gives an equal recipe."""
    return dump_yaml(recipe.model_dump())


def schema_json() -> str:
    """The JSON schema of recipes, as shipped in `recipes/schema.json`."""
    return json.dumps(Recipe.model_json_schema(), indent=1) + "\n"


def _describe(fault: Any) -> str:
    # pydantic adds names of union branches to the path; only our own keys are of use to a reader
    location = [str(p) for p in fault["loc"]]
    path, model = _known_prefix(location)
    name = ".".join(path)
    if fault["type"] == "extra_forbidden":
        nearest = _nearest_key(location, model)
        hint = f"; did you mean {nearest}?" if nearest else ""
        return f"{'.'.join(location)}: unknown key{hint}"
    if fault["type"] == "missing":
        return f"{'.'.join(location)}: this key is required"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{name}: {message}" if name else message
    if fault["type"] == "model_type":  # whose own words name a class
        of = fault["ctx"]["class_name"]
        what = "shards (a pattern, or a list of them)" if of == WeightedShards.__name__ else "keys"
        return f"{name}: should hold {what}, found {fault['input']!r:.200}"
    quotes = "; put it in quotes" if fault["type"] == "string_type" else ""
    found = f"{message[0].lower() + message[1:]}, found {fault['input']!r:.200}{quotes}"
    return f"{name or '.'.join(location)}: {found}"


def _known_prefix(location: list[str]) -> tuple[list[str], type[BaseModel]]:
    """The part of an error location that are keys of the schema, and the innermost section."""
    model: type[BaseModel] = Recipe
    path: list[str] = []
    while len(path) < len(location):
        key = location[len(path)]
        field = model.model_fields.get(key)
        if field is None:
            break
        path.append(key)
        items, index = _sections_in(field.annotation), "".join(location[len(path) :][:1])
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            model = field.annotation
        elif items is not None and index.isdecimal():
            path.append(index)
            model = items
        else:
            break
    return path, model


def _sections_in(kind: Any) -> type[BaseModel] | None:
    """What the items of a list of sections are; None if a value of this type is no such list."""
    inner = get_args(kind)
    if get_origin(kind) is list:
        is_section = isinstance(inner[0], type) and issubclass(inner[0], BaseModel)
        return inner[0] if is_section else None
    return next((found for part in inner if (found := _sections_in(part)) is not None), None)


def _nearest_key(location: list[str], model: type[BaseModel]) -> str | None:
    wrong = location[-1]
    near = difflib.get_close_matches(wrong, model.model_fields, n=1, cutoff=0.6)
    if near:
        return ".".join([*location[:-1], near[0]])
    for section, field in Recipe.model_fields.items():  # the right key in the wrong section
        owner = field.annotation
        if isinstance(owner, type) and wrong in getattr(owner, "model_fields", {}):
            return f"{section}.{wrong}"
    return None


def _kind(value: object) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"
