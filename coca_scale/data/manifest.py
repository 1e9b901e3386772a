"""How many samples shards hold: `manifest.json` of coca-scale, or webdataset's `sizes.json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field

from coca_scale.data.retries import StorageError
from coca_scale.data.sample import DataError
from coca_scale.data.storage import PIPE, StorageOptions, is_local, read_whole
from coca_scale.errors import UserError
from coca_scale.recipe.files import parse_json, validated

MANIFEST = "manifest.json"
SIZES = "sizes.json"


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"a number is meant, found {value}")
    return value


# no shard has more samples, and sums stay far below 2^63
Count = Annotated[int, Field(ge=0, le=2**40), BeforeValidator(_no_flag)]


def shard_counts(urls: Sequence[str], options: StorageOptions) -> np.ndarray | None:
    """Samples of each shard, int64 [shards], from the files beside them; None if one is not listed.

    Raises:
        DataError: a file of that name with something else in it.
    """
    known: dict[str, dict[str, int]] = {}
    counts = np.empty(len(urls), np.int64)
    for number, url in enumerate(urls):
        if url.startswith(PIPE):
            return None
        folder, _, name = url.rpartition("/")
        if folder not in known:
            known[folder] = _listed(folder, options)
        count = known[folder].get(name)
        if count is None:
            return None
        counts[number] = count
    return counts


def _listed(folder: str, options: StorageOptions) -> dict[str, int]:
    prefix = f"{folder}/" if folder else ""
    uncached = StorageOptions(options.retries, options.timeout_seconds)
    for name in (MANIFEST, SIZES):
        path = prefix + name
        try:
            content = read_whole(path, uncached)
        except FileNotFoundError:
            continue
        except StorageError:
            if is_local(path):
                raise
            continue  # buckets that may not be listed deny what is not there
        try:
            found = parse_json(content, path) if name == SIZES else _samples(content, path)
            return validated(found, dict[str, Count], path)
        except UserError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise DataError(
                f"{path}: not a list of shards and their sizes ({reason}); remove it, or make it "
                "anew with coca-scale data inspect SHARDS --write-manifest"
            ) from error
    return {}


def _samples(content: bytes, path: str) -> dict[str, Any]:
    """Sizes out of a manifest; its entries are dropped as they are read, 200,000 take 100 MB."""
    found: dict[str, Any] = {}

    def take(pairs: list[tuple[str, Any]]) -> Any:
        entry = dict(pairs)
        if "shards" in entry or not isinstance(entry.get("name"), str):
            return entry
        found[entry["name"]] = entry.get("samples")
        return None

    whole = parse_json(content, path, take)
    listed = whole.get("shards") if isinstance(whole, dict) else None
    if not isinstance(listed, list):
        raise UserError("it has no list `shards`")
    if len(listed) != len(found):
        raise UserError("shards without a name, or with the same one")
    return found
