"""Options of OpenCLIP's main branch that the installed release has not."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from coca_scale.errors import UserError
from coca_scale.openclip.options import NEWER

Given = dict[str, list[str]]
_SWITCHES = ("persistent_workers", "text_attention_mask")  # which `--no-` turns off
_HARMLESS = {"image_key": {"jpg", "jpeg", "png", "webp"}, "text_key": {"txt"}}


def split_newer(arguments: Sequence[str]) -> tuple[list[str], Given]:
    """Take those options out of a command.

    Returns:
        The rest, for OpenCLIP's own parser, and the words behind each newer option by its name,
        none behind a switch.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in NEWER:
        flags = [f"--{name}", f"--no_{name}"] if name in _SWITCHES else [f"--{name}"]
        parser.add_argument(*(flag.replace("_", "-") for flag in flags), dest=name, nargs="*")
    found, rest = parser.parse_known_args(arguments)
    return rest, {name: words for name, words in vars(found).items() if words is not None}


def is_harmless(name: str, given: Given) -> bool:
    """Whether an option that is refused has a value with which it changes nothing."""
    words = {part for word in given.get(name, []) for part in word.split(";")}
    return name in _HARMLESS and words <= _HARMLESS[name]


def data_keys(given: Given) -> dict[str, Any]:
    """What they say of the section `data`.

    OpenCLIP puts captions in a random order by their chances and takes the first that is there,
    which is to draw among those that are there.

    Raises:
        UserError: fields of which the first that is there is meant, or chances that are none.
    """
    if "json_text_key" not in given:
        return {}
    fields = _one(given, "json_text_key").split(";")
    if "json_text_key_probs" not in given:
        if len(fields) > 1:
            raise UserError(
                "--json-text-key: of several fields one is drawn by its chance, never the first "
                "that is there; --json-text-key-probs has the chances"
            )
        return {"captions": {fields[0]: 1.0}}
    chances = [_number("json_text_key_probs", word) for word in given["json_text_key_probs"]]
    if len(chances) > len(fields) or not any(chances):
        raise UserError(f"--json-text-key-probs: {len(fields)} fields, {chances}")
    return {"captions": {field: p for field, p in zip(fields, chances, strict=False) if p}}


def loss_keys(given: Given, caption_weight: float) -> dict[str, Any]:
    """What they say of the section `loss`.

    Raises:
        UserError: a word that is no number, or a z-loss without the caption loss.
    """
    section: dict[str, Any] = {}
    if "caption_z_loss_weight" in given:
        weight = _only(given, "caption_z_loss_weight")
        if weight and not caption_weight:
            raise UserError(
                "--caption-z-loss-weight: it is part of the caption loss, whose weight is 0"
            )
        if weight:
            section["z_loss"] = weight / caption_weight
    if "caption_loss_chunk_size" in given:
        section["caption_chunk_rows"] = int(_only(given, "caption_loss_chunk_size"))
    return section


def optim_keys(given: Given) -> dict[str, Any]:
    """What they say of the section `optim`.

    Raises:
        UserError: a word that is no number, or towers with decays of their own.
    """
    image = "visual_layer_decay" if "visual_layer_decay" in given else "image_layer_decay"
    decays = {_only(given, name) if name in given else 1.0 for name in (image, "text_layer_decay")}
    if len(decays) > 1:
        raise UserError(
            "--image-layer-decay, --text-layer-decay: optim.layer_decay is the same for all towers"
        )
    decay = decays.pop()
    return {} if decay == 1.0 else {"layer_decay": decay}


def log_keys(given: Given) -> dict[str, Any]:
    """What they say of the section `log`.

    Raises:
        UserError: a word that is no number.
    """
    name = "log_metric_every_n_steps"
    return {"every_steps": int(_only(given, name))} if name in given else {}


def _one(given: Given, name: str) -> str:
    """The only word behind an option.

    Raises:
        UserError: there are none, or several.
    """
    words = given[name]
    if len(words) != 1:
        raise UserError(f"--{name.replace('_', '-')}: one value, not {len(words)}")
    return words[0]


def _only(given: Given, name: str) -> float:
    return _number(name, _one(given, name))


def _number(name: str, word: str) -> float:
    try:
        return float(word)
    except ValueError as error:
        raise UserError(f"--{name.replace('_', '-')}: {word!r} is no number") from error
