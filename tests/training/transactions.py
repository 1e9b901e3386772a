"""What W&B would upload: its transaction log, records in LevelDB's log format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

FILE_HEADER, BLOCK, CHUNK_HEADER = 7, 32768, struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Record]:
    """All records of a .wandb file."""
    content = path.read_bytes()
    offset, parts = FILE_HEADER, b""
    while offset + CHUNK_HEADER.size <= len(content):
        left = BLOCK - offset % BLOCK
        if left < CHUNK_HEADER.size:  # padding at the end of a block
            offset += left
            continue
        _, size, kind = CHUNK_HEADER.unpack_from(content, offset)
        offset += CHUNK_HEADER.size
        assert kind in (FULL, FIRST, MIDDLE, LAST), kind
        parts += content[offset : offset + size]
        offset += size
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def history(path: Path) -> list[dict[str, Any]]:
    """The logged steps, each with its values."""
    rows = [record.history for record in records(path) if record.HasField("history")]
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item}
        for row in rows
    ]
