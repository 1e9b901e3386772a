"""Shards with every kind of rot planted in them, and what was planted where."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np

from coca_scale.data.manifest import MANIFEST
from tests.data.pngs import black_png
from tests.data.shards import encoded

EVERY = 20  # samples: 5 % of each kind


GOOD = encoded()
BOMB = black_png(30000, 30000)  # 900 million pixels
KINDS = {
    "missing_caption": [("jpg", GOOD)],
    "missing_image": [("txt", b"words")],
    "empty_caption": [("jpg", GOOD), ("txt", b" \n")],
    "caption_not_utf8": [("jpg", GOOD), ("txt", b"caf\xe9 \xff")],
    "broken_json": [("jpg", GOOD), ("json", b'{"caption": "cut o')],
    "broken_image": [("jpg", GOOD[: len(GOOD) // 2]), ("txt", b"words")],
    "tiny_image": [("png", encoded(size=(1, 30), form="PNG")), ("txt", b"words")],
    "huge_image": [("png", BOMB), ("txt", b"words")],
    "wrong_extension": [("html", b"<html>"), ("txt", b"words")],
    "duplicate_key": [("jpg", GOOD), ("txt", b"words")] * 2,
    "unsafe_name": [("jpg", GOOD), ("txt", b"words")],
    "unsafe_member": [("jpg", None), ("txt", b"words")],  # a symbolic link
}
TRICKS = ("../../escape_{}", "/tmp/escape_{}", "a/../../escape_{}")


def write_rotten_shards(folder, shards=40, samples=60):
    """Returns {cause: set of (shard, key)}, with the manifest of the shards before they rotted."""
    planted = {cause: set() for cause in KINDS}
    kinds = list(KINDS)
    rng = np.random.default_rng(0)
    entries = []
    for shard in range(shards):
        name = f"{shard:03d}.tar"
        with tarfile.open(folder / name, "w") as tar:
            chosen = rng.permutation(samples)  # which samples rot
            for i in range(samples):
                number = int(chosen[i])
                kind = kinds[number // (samples // EVERY)] if number < len(kinds) * 3 else None
                key = f"{shard}_{i}"
                if kind == "unsafe_name":
                    key = TRICKS[i % 3].format(key)
                members = KINDS[kind] if kind else [("jpg", GOOD), ("txt", b"fine words")]
                if kind:
                    planted[kind].add((name, key))
                for extension, content in members:
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    if content is None:
                        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                    info.size = len(content or b"")
                    tar.addfile(info, io.BytesIO(content or b""))
        entries.append({"name": name, "samples": samples, "bytes": 0, "sha256": ""})
    manifest = {"samples": shards * samples, "bad": {}, "shards": entries}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return planted


def rot_shards(folder, planted, shards=40, samples=60):
    """Truncate and empty 5 % of the shards each; returns samples lost by cause."""
    lost = {"truncated_shard": 0, "empty_shard": 0}
    for number in range(shards):
        path = folder / f"{number:03d}.tar"
        if number % 20 == 3:
            content = path.read_bytes()
            with tarfile.open(path) as tar:  # cut in the middle of the 31st sample's first member
                keys = []
                for member in tar.getmembers():
                    key = member.name.rpartition(".")[0]
                    if key not in keys:
                        keys.append(key)
                    if len(keys) == 31 and member.size > 1:
                        cut = member.offset_data + member.size // 2
                        break
                    if len(keys) == 32:
                        cut = member.offset + 100
                        break
            path.write_bytes(content[:cut])
            keep = set(keys[: len(keys) - 1])
            lost["truncated_shard"] += samples - len(keep)
        elif number % 20 == 11:
            path.write_bytes(b"")
            keep = set()
            lost["empty_shard"] += samples
        else:
            continue
        for cause in planted:
            planted[cause] = {
                (shard, key) for shard, key in planted[cause] if shard != path.name or key in keep
            }
    return lost
