"""How many samples shards hold: `manifest.json` of coca-scale, or webdataset's `sizes.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from coca_scale.data.retries import StorageError
from coca_scale.data.sample import DataError
from coca_scale.data.storage import PIPE, StorageOptions, is_local, read_whole
from coca_scale.errors import UserError

MANIFEST = "manifest.json"
SIZES = "sizes.json"


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
            content = read_whole(path, uncached).decode("utf-8", "replace")
        except FileNotFoundError:
            continue
        except StorageError:
            if is_local(path):
                raise
            continue  # buckets that may not be listed deny what is not there
        try:
            return _sizes(content) if name == SIZES else _samples(content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: not a list of shards and their sizes") from error
    return {}


def _sizes(content: str) -> dict[str, int]:
    return {str(shard): int(samples) for shard, samples in json.loads(content).items()}


def _samples(content: str) -> dict[str, int]:
    """Sizes out of a manifest; its entries are dropped as they are read, 200,000 take 100 MB."""
    found: dict[str, int] = {}

    def take(pairs: list[tuple[str, Any]]) -> Any:
        entry = dict(pairs)
        if "name" not in entry:
            return entry
        found[str(entry["name"])] = int(entry["samples"])
        return None

    listed = json.loads(content, object_pairs_hook=take)["shards"]
    if len(listed) != len(found):
        raise UserError("shards without a name, or with the same one")
    return found
