"""Runs on drawings for benchmarks that compare recipes: several cases, several seeds."""

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
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from coca_scale.engine.world import World
from coca_scale.planning.costs import model_flops
from coca_scale.recipe import BatchSplit, load_recipe

RUN = "import sys; from coca_scale import train_recipe; train_recipe(sys.argv[1], *sys.argv[2:])"
QUIET = ("log.tensorboard=false", "log.every_steps=100", "data.val=null")

Scores = Callable[[Path, World], dict[str, float]]


def compare(
    description: str | None, recipe: Path, cases: Mapping[str, Sequence[str]], scores: Scores
) -> None:
    """Train every case with every seed, print, and write the result after every run.

    Args:
        description: of the benchmark, for its `--help`.
        recipe: of all cases.
        cases: what each changes in it.
        scores: of the model that a run has left.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(cases)))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    world = World.alone(torch.device("cpu"))
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.environ['OMP_NUM_THREADS']} threads",
        "versions": {p: version(p) for p in ("torch", "deepspeed")},
        "steps": load_recipe(recipe, ()).train.steps,
        "cases": {},
    }
    for name in (list(cases)[number] for number in arguments.cases):
        changes, runs = cases[name], dict[int, dict[str, float]]()
        flops = total_flops(recipe, changes)
        result["cases"][name] = case = {"changes": list(changes), "flops": flops, "runs": runs}
        for seed in arguments.seeds:
            with tempfile.TemporaryDirectory() as folder:
                train(recipe, changes, seed, Path(folder))
                runs[seed] = scores(Path(folder), world)
            print(name, seed, json.dumps(runs[seed]), flush=True)
            names = runs[seed].keys()
            case["means"] = {s: statistics.mean(run[s] for run in runs.values()) for s in names}
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["cases"], indent=1))


def total_flops(recipe: Path, changes: Sequence[str]) -> float:
    """Of a whole run."""
    changed = load_recipe(recipe, changes)
    assert changed.train.steps is not None
    samples = changed.train.steps * changed.train.global_batch
    return samples * model_flops(changed, BatchSplit.from_recipe(changed, 1))


def train(recipe: Path, changes: Sequence[str], seed: int, folder: Path) -> None:
    """A run from its beginning to its end, on one rank."""
    overrides = (*changes, f"run.dir={folder}", f"run.seed={seed}", *QUIET)
    subprocess.run([sys.executable, "-c", RUN, str(recipe), *overrides], check=True)
