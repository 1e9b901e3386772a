"""What a caption for each loss gives and costs, on drawings and with several seeds.

    python benchmarks/two_captions.py --seeds 0 1 2 --out benchmarks/results/two_captions_cpu.json

Trains recipes/tiny_two_captions.yaml, which matches short captions and writes long ones, and the
same with either for both, to their ends, one after the other on one rank. All are asked the same
of 256 held-out drawings: to find them by their short captions and by their long ones, where any
drawing with an equal caption is right, and to write, which is compared with the long ones. FLOPs
are those of forward and backward passes, counted, of all samples seen.
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

import torch

from coca_scale.data.sources import open_source
from coca_scale.engine.world import World
from coca_scale.evaluation.captioning_scores import Captioning
from coca_scale.evaluation.encoder import Feeding, loaded_encoder
from coca_scale.evaluation.retrieval import Retrieval
from coca_scale.inference.load import load_model
from coca_scale.planning.costs import model_flops
from coca_scale.recipe import BatchSplit, load_recipe
from coca_scale.training.validation import GREEDY, HeldPictures

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny_two_captions.yaml"
ONE = ("data.contrastive_captions={}", "data.caption_captions={}")
CASES = {
    "short for both": ONE,
    "long for both": (*ONE, "data.captions={long: 1.0}", "data.mean_tokens=31"),
    "short to match, long to write": (),
    "short or a sentence to match, long to write": (
        "data.contrastive_captions={txt: 0.5, long:sentences: 0.5}",
    ),
    "as the third, 25 % in parallel": ("loss.caption_parallel=0.25",),
}
RUN = "import sys; from coca_scale import train_recipe; train_recipe(sys.argv[1], *sys.argv[2:])"
QUIET = ("log.tensorboard=false", "log.every_steps=100", "data.val=null")
HELD_OUT = 256


def total_flops(changes: Sequence[str]) -> float:
    """Of a whole run."""
    recipe = load_recipe(RECIPE, changes)
    assert recipe.train.steps is not None
    samples = recipe.train.steps * recipe.train.global_batch
    return samples * model_flops(recipe, BatchSplit.from_recipe(recipe, 1))


def scores(folder: Path, world: World) -> dict[str, float]:
    """Of the model that a run has left."""
    encoder = loaded_encoder(load_model(str(folder)), world)
    found: dict[str, float] = {}
    for kind in ("txt", "long"):
        recipe = load_recipe(RECIPE, (*ONE, f"data.captions={{{kind}: 1.0}}"))
        assert recipe.data.val is not None
        pictures = HeldPictures(open_source(recipe.data.val, recipe.data, 0), HELD_OUT)
        retrieval = Retrieval(pictures, equal_captions=True).run(encoder, Feeding())
        for name in ("image_to_text_r1", "text_to_image_r1"):
            found[f"{kind}_{name}"] = retrieval.scores[name]
    written = Captioning(pictures, GREEDY, HELD_OUT, java=False).run(encoder, Feeding())
    return found | {name: written.scores[name] for name in ("cider", "exact")}


def trained(changes: Sequence[str], seed: int, folder: Path) -> None:
    """A run from its beginning to its end."""
    overrides = (*changes, f"run.dir={folder}", f"run.seed={seed}", *QUIET)
    subprocess.run([sys.executable, "-c", RUN, str(RECIPE), *overrides], check=True)


def main() -> None:
    """Train, print, and write the result after every run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    world = World.alone(torch.device("cpu"))
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.environ['OMP_NUM_THREADS']} threads",
        "versions": {p: version(p) for p in ("torch", "deepspeed")},
        "steps": load_recipe(RECIPE, ()).train.steps,
        "cases": {},
    }
    for name in (list(CASES)[number] for number in arguments.cases):
        changes, runs = CASES[name], dict[int, dict[str, float]]()
        result["cases"][name] = case = {"flops": total_flops(changes), "runs": runs}
        for seed in arguments.seeds:
            with tempfile.TemporaryDirectory() as folder:
                trained(changes, seed, Path(folder))
                runs[seed] = scores(Path(folder), world)
            print(name, seed, json.dumps(runs[seed]), flush=True)
            names = runs[seed].keys()
            case["means"] = {s: statistics.mean(run[s] for run in runs.values()) for s in names}
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["cases"], indent=1))


if __name__ == "__main__":
    main()
