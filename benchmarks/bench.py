"""All benchmarks of models and losses in one run: tables on screen, JSON and a plot in a folder.

    make bench            # or: python benchmarks/bench.py [--out benchmarks/results] [--rounds 3]

coca_ViT-B-32 is timed; of coca_ViT-L-14, which is slow on a CPU, FLOPs and bytes are counted.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import losses
import matplotlib
import torch
import train_step

from coca_scale.planning.fit import plan_run
from coca_scale.planning.gpus import GPUS
from coca_scale.recipe import load_recipe

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {
    "image": "#4c72b0",
    "text": "#55a868",
    "decoder": "#dd8452",
    "caption head": "#c44e52",
    "rest": "#937860",
}


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """What every model keeps for its backward pass, by part, and what it computes."""
    figure, axes = plt.subplots(len(found), 2, figsize=(10, 2.2 * len(found)), squeeze=False)
    for (bytes_axis, cost_axis), case in zip(axes, found, strict=True):
        names = list(case["results"])[::-1]
        rows = [case["results"][name] for name in names]
        left = [0.0] * len(rows)
        for part, colour in COLOURS.items():
            sizes = [r["saved_bytes_by_part"].get(part, 0) / 2**20 / case["batch"] for r in rows]
            bytes_axis.barh(names, sizes, left=left, color=colour, label=part)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        bytes_axis.set_xlabel(
            f"{case['model']}: MiB per sample kept for backward ({case['dtype']})"
        )
        key = "step_seconds" if "step_seconds" in rows[0] else "flops"
        base = case["results"]["open_clip CLIP"][key]
        ratios = [row[key] / base for row in rows]
        bars = cost_axis.barh(names, ratios, color="#8172b3")
        cost_axis.bar_label(bars, [f"{ratio:.2f}×" for ratio in ratios], padding=3)
        cost_axis.set_xlim(0, 1.2 * max(ratios))
        cost_axis.axvline(1, color="0.5", linewidth=0.8)
        cost_axis.set_yticks([])
        label = "step time" if key == "step_seconds" else "FLOPs"
        cost_axis.set_xlabel(f"{case['model']}: {label} against open_clip's CLIP")
    axes[0][0].legend(
        fontsize=7, ncols=5, loc="lower left", bbox_to_anchor=(-0.05, 1), frameon=False
    )
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    on_gpu = torch.cuda.is_available()
    device = "gpu" if on_gpu else "cpu"
    found = []
    sizes = {"ViT-B-32": (32, options.rounds), "ViT-L-14": (4, options.rounds if on_gpu else 0)}
    for model, (batch, rounds) in sizes.items():
        case = train_step.compare(model, batch, rounds, "selective")
        train_step.show(case)
        write(case, options.out / f"train_step_{model.lower()}_{device}.json")
        found.append(case)
    rows = losses.caption_losses(options.rounds) + losses.contrastive_losses(options.rounds)
    losses.show(rows)
    write(rows, options.out / f"losses_{device}.json")
    print("communication")
    write(traffic(64), options.out / "communication.json")
    plot(found, options.out / f"train_step_{device}.png")
    print(f"written to {options.out}")


def traffic(ranks: int) -> list[dict[str, Any]]:
    """Bytes that each rank sends in a step, as `plan` counts them.

    The tests compare these counts with DeepSpeed's log of real steps (tests/planning).
    """
    rows = []
    for stage in (1, 2, 3):
        recipe = load_recipe(Path("recipes/large.yaml"), [f"engine.zero_stage={stage}"])
        _, _, plan = plan_run(recipe, ranks, GPUS["h100-80gb"])
        sent = plan.communication_bytes_per_step
        rows.append({"ranks": ranks, "zero_stage": stage, "bytes_per_rank_and_step": sent})
        print(
            f"  large.yaml on {ranks} ranks, ZeRO {stage}: {sent / 1e9:6.2f} GB per rank and step"
        )
    return rows


def write(found: object, path: Path) -> None:
    """As JSON."""
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
