"""The loader's share of a training run: time that steps wait for data.

    python benchmarks/loader_share.py --out benchmarks/results/loader_share_cpu.json

Trains recipes/tiny.yaml for some steps on 512 px JPEGs in shards, with 0, 1 and 2 loader processes
or as many as `--workers` says, and takes `data_wait_fraction` from metrics.jsonl without the first
lines, which have the start-up. On a GPU in bf16; `key=value` changes the recipe.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from loader import processor, show, write_data

SKIPPED_LINES = 2
RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
RUN = "import sys; from coca_scale import train_recipe; train_recipe(sys.argv[1], *sys.argv[2:])"


def share(
    shards: str, folder: Path, workers: int, steps: int, changes: list[str]
) -> dict[str, float]:
    """Median waiting share and samples per second of one run."""
    overrides = [
        *(f"data.train={shards}", "data.val=null", f"data.workers={workers}"),
        *(f"train.steps={steps}", "log.every_steps=2", "log.tensorboard=false"),
        *("checkpoint.every_steps=null", "eval.every_steps=null", f"run.dir={folder}"),
        *changes,
    ]
    subprocess.run([sys.executable, "-c", RUN, str(RECIPE), *overrides], check=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    used = lines[SKIPPED_LINES:]
    return {
        "data_wait_fraction": statistics.median(line["data_wait_fraction"] for line in used),
        "samples_per_second": statistics.median(line["samples_per_second"] for line in used),
    }


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("changes", nargs="*", metavar="key=value", help="of the recipe")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cuda" if on_gpu else "cpu")
    gpu = ["engine.precision=bf16", "train.micro_batch=64"] if on_gpu else []
    with tempfile.TemporaryDirectory() as name:
        shards = write_data(Path(name), 256, 512)
        by_workers = {
            str(workers): share(
                shards,
                Path(name) / f"run{workers}",
                workers,
                arguments.steps,
                gpu + arguments.changes,
            )
            for workers in arguments.workers
        }
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": processor(),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "changes": arguments.changes,
        "workers": by_workers,
    }
    show(result, arguments.out)


if __name__ == "__main__":
    main()
