"""What training in stages costs and gives, on drawings and with several seeds.

    python benchmarks/stages.py --seeds 0 1 2 --out benchmarks/results/stages_cpu.json

Trains recipes/tiny_staged.yaml, and the same at its full size from the beginning, to their ends,
one after the other on one rank, and takes retrieval and the share of captions that are right from
their last validation, of 256 held-out drawings. FLOPs are those of forward and backward passes,
counted, of all samples seen; what is computed twice to save memory is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from coca_scale.planning.costs import model_flops
from coca_scale.recipe import BatchSplit, load_recipe
from coca_scale.recipe.stages import stages_of

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny_staged.yaml"
CASES = {
    "96 px throughout": ("schedule.stages=[]", "train.steps=600", "schedule.name=cosine"),
    "48 px, then 96": (),
}
RUN = "import sys; from coca_scale import train_recipe; train_recipe(sys.argv[1], *sys.argv[2:])"
SCORES = ("image_to_text_r1", "text_to_image_r1", "exact")
QUIET = ("log.tensorboard=false", "log.every_steps=100", "eval.scored_captions=256")


def total_flops(changes: Sequence[str]) -> float:
    """Of a whole run."""
    total = 0.0
    for stage in stages_of(load_recipe(RECIPE, changes), lambda: None):
        samples = stage.samples_seen(stage.last) - stage.samples_before
        total += samples * model_flops(stage.recipe, BatchSplit.from_recipe(stage.recipe, 1))
    return total


def trained(changes: Sequence[str], seed: int, folder: Path) -> dict[str, float]:
    """Scores at the end of a run, and its seconds."""
    started = time.perf_counter()
    overrides = (*changes, f"run.dir={folder}", f"run.seed={seed}", *QUIET)
    subprocess.run([sys.executable, "-c", RUN, str(RECIPE), *overrides], check=True)
    last = json.loads((folder / "validation.jsonl").read_text().splitlines()[-1])
    return {**{name: last[name] for name in SCORES}, "seconds": time.perf_counter() - started}


def main() -> None:
    """Train, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    found: dict[str, Any] = {}
    for name, changes in CASES.items():
        flops, runs = total_flops(changes), {}
        for seed in arguments.seeds:
            with tempfile.TemporaryDirectory() as folder:
                runs[seed] = trained(changes, seed, Path(folder))
            print(name, seed, json.dumps(runs[seed]), flush=True)
        means = {s: statistics.mean(run[s] for run in runs.values()) for s in SCORES}
        found[name] = {"flops": flops, "runs": runs, "means": means}
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.environ['OMP_NUM_THREADS']} threads",
        "versions": {p: version(p) for p in ("torch", "deepspeed")},
        "cases": found,
    }
    print(json.dumps(result, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
