"""Captions with and without cached keys and values: the same beam search, side by side.

    python benchmarks/generation.py [--models ViT-B-32 ViT-L-14] [--batch 16] [--rounds 3]
        [--out benchmarks/results/generation_cpu.json]

Random weights, and no end token before the last place, so that all captions are full. Without
a cache, as in open_clip, every step computes all tokens so far and the keys and values of the image
tokens of every beam; the image is encoded once by both. That takes minutes on a CPU and is done
once; with the cache, the median of the rounds counts. Peak bytes are those of live tensors without
the weights (of device memory on a GPU, with them).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from timing import synchronize
from torch import Tensor

from coca_scale.inference.beam import BeamSearch
from coca_scale.inference.generate import generate
from coca_scale.inference.generation_options import GenerationOptions
from coca_scale.inference.prompts import make_prompts
from coca_scale.model import CoCa, load_model_config
from coca_scale.planning.counting import LiveBytes

LENGTH = 30
BEAMS = 6
END = 49_407


@torch.no_grad()
def uncached(coca: CoCa, images: Tensor, special: Any, options: GenerationOptions) -> Tensor:
    """The search of `generate`, with a model that remembers nothing; returns the best captions."""
    device = images.device
    given = [[special.start_id]] * len(images)
    prompts = make_prompts(given, LENGTH, special.end_id, special.pad_id, device)
    search = BeamSearch(prompts, options)
    image_tokens = coca.image(images)[1].repeat_interleave(BEAMS, 0)
    for position in range(1, LENGTH):
        logits = coca.caption_logits(image_tokens, search.written(position))[:, -1]
        search.advance(logits, position)
        if search.finished:
            break
    return search.result()[0]


def measure(step: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What it returns, and seconds."""
    synchronize()
    started = time.perf_counter()
    tokens = step()
    synchronize()
    return tokens, time.perf_counter() - started


def peak(step: Callable[[], Tensor]) -> int:
    """Most bytes alive, in a run of its own: watching takes time."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    with LiveBytes() as live:
        step()
    return live.peak


def compare(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """One model."""
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    config = load_model_config(f"coca_{name}")
    coca = CoCa(config).eval().requires_grad_(False)
    coca = coca.to("cuda", torch.bfloat16) if on_gpu else coca
    weight = next(coca.parameters())
    size = config.vision_cfg.image_size
    images = torch.randn(batch, 3, size, size).to(weight)
    special = SimpleNamespace(start_id=49_406, end_id=END, pad_id=0)
    options = GenerationOptions(seq_len=LENGTH, num_beams=BEAMS, min_seq_len=LENGTH - 1)

    def cached() -> Tensor:
        return generate(coca, images, special, options).tokens_BNL

    def slow() -> Tensor:
        return uncached(coca, images, special, options)

    cached()  # warm-up
    runs = [measure(cached) for _ in range(rounds)]
    if on_gpu:
        slow()  # warm-up: kernels of 29 lengths
    slow_tokens, slow_seconds = measure(slow)
    runs += [measure(cached) for _ in range(rounds)]
    seconds = statistics.median(run[1] for run in runs)
    written = batch * (LENGTH - 1)
    same = (runs[0][0] == slow_tokens).all(-1).float().mean()
    return {
        "model": f"coca_{name}",
        "batch": batch,
        "beams": BEAMS,
        "length": LENGTH,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "cached_seconds": seconds,
        "uncached_seconds": slow_seconds,
        "speed_up": slow_seconds / seconds,
        "cached_tokens_per_second": written / seconds,
        "uncached_tokens_per_second": written / slow_seconds,
        "cached_peak_bytes": peak(cached),
        "uncached_peak_bytes": peak(slow),
        "versions": {"torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"),
        "same_captions": float(same),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["ViT-B-32", "ViT-L-14"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = []
    for name in options.models:
        case = compare(name, options.batch, options.rounds)
        found.append(case)
        print(f"{case['model']}, batch {case['batch']}, {BEAMS} beams, {LENGTH} tokens:")
        for kind in ("cached", "uncached"):
            print(
                f"  {kind:<9}{case[f'{kind}_seconds']:8.2f} s"
                f"{case[f'{kind}_tokens_per_second']:9.1f} tokens/s"
                f"{case[f'{kind}_peak_bytes'] / 2**20:9.0f} MiB"
            )
        print(f"  {case['speed_up']:.1f}× faster, {case['same_captions']:.0%} of captions equal")
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
