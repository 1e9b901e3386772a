"""What a list of 200,000 shards costs a rank: seconds and bytes to open it and to deal an epoch.

    python benchmarks/shard_lists.py --out benchmarks/results/shard_lists.json

Resident memory is read from the kernel, after imports and before and after each part; the peak is
that of the whole process above its size after imports.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from coca_scale.data.manifest import MANIFEST
from coca_scale.data.shards import ShardSource
from coca_scale.data.sources import open_source
from coca_scale.recipe.data import DataSection

LANES, RANKS = 4096, 64


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(pattern: str) -> dict[str, Any]:
    """Open the list and deal one rank's lanes of an epoch."""
    before = resident()
    started = time.perf_counter()
    source = open_source(pattern, DataSection(train=pattern), 0)
    opened = time.perf_counter()
    assert isinstance(source, ShardSource)
    parts = [source.epochs.parts(lane, LANES, 1) for lane in range(LANES // RANKS)]
    dealt = time.perf_counter()
    return {
        "shards": len(source.urls),
        "sizes_known": source.epochs.counted,
        "open_seconds": round(opened - started, 3),
        "deal_seconds": round(dealt - opened, 3),
        "parts_of_a_rank": sum(map(len, parts)),
        "kept_megabytes": round((resident() - before) / 1e6, 1),
        "peak_megabytes": round((peak() - before) / 1e6, 1),
    }


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shards", type=int, default=200_000)
    arguments = parser.parse_args()
    last = f"{arguments.shards - 1:06d}"
    results = [measure(f"s3-like/bucket/laion2b/data/{{000000..{last}}}.tar")]
    with tempfile.TemporaryDirectory() as name:
        with (Path(name) / MANIFEST).open("w") as file:
            file.write('{"samples": 0, "bad": {}, "shards": [\n')
            for number in range(arguments.shards):
                shard = {"name": f"{number:06d}.tar", "samples": 9000 + number % 1000}
                entry = json.dumps({**shard, "bytes": 3 * 10**8, "sha256": "0" * 64})
                file.write(entry + (",\n" if number + 1 < arguments.shards else "\n]}\n"))
        results.append(measure(f"{name}/{{000000..{last}}}.tar"))
    text = json.dumps({"date": time.strftime("%Y-%m-%d"), "results": results}, indent=1)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
