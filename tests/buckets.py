"""What tests look up in the bucket of `loopback_s3`, without faults."""

from __future__ import annotations

import hashlib
import json
from typing import Any

BUCKET = "bucket"


def keys(client: Any, prefix: str) -> list[str]:
    """Of all objects whose keys begin with `prefix`."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


def content(client: Any, key: str) -> bytes:
    """Of an object."""
    found: bytes = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    return found


def complete(client: Any, run: str) -> list[str]:
    """Names of a run's checkpoints that have a manifest, the newest first."""
    parts = (key.split("/") for key in keys(client, f"{run}/checkpoints/step_"))
    return sorted((part[-2] for part in parts if part[-1] == "manifest.json"), reverse=True)


def require_whole(client: Any, run: str, name: str) -> None:
    """See that a checkpoint has the files of its manifest, and no others."""
    folder = f"{run}/checkpoints/{name}/"
    there = {key.removeprefix(folder) for key in keys(client, folder)} - {"manifest.json"}
    files = json.loads(content(client, f"{folder}manifest.json"))["files"]
    assert there == set(files), name
    for file, entry in files.items():
        found = content(client, folder + file)
        assert hashlib.sha256(found).hexdigest() == entry["sha256"], f"{name}: {file}"
