"""A whole optimizer step on one device: the engine's, or open_clip's in plain torch.

    python benchmarks/engine_step.py --model coca_ViT-L-14 --batch 192 [engine.zero_stage=2 ...]
    python benchmarks/engine_step.py --model coca_ViT-L-14 --batch 96 --open-clip amp_bf16

A step is forward, losses, backward, clipping and AdamW over all weights, on images and captions
that are there already: 20 tokens on average, of lengths as `coca-scale plan` takes them; open_clip
pads them to the context. Rounds of four steps are timed, with one wait for the device at the end of
each. MFU counts the FLOPs that real tokens need, and nothing that is computed twice. One JSON line
is printed; `--out FILE` adds it to a file. `--profile FILE` writes where the device's time goes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from open_clip.loss import ClipLoss, CoCaLoss
from timing import synchronize
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from train_step import (
    CAPTION_WEIGHT,
    CONTEXT,
    CONTRASTIVE_WEIGHT,
    MEAN_TOKENS,
    captions,
    published,
)

from coca_scale.planning.costs import model_flops
from coca_scale.planning.gpus import peak_flops
from coca_scale.recipe import BatchSplit, Recipe, recipe_from_dict
from coca_scale.recipe.yaml_text import parse_yaml
from coca_scale.training.garbage_collection import GarbageCollection

LR = 1e-4
STEPS_PER_ROUND = 4
Step = Callable[[int], Callable[[], float]]  # begins one; what it returns waits for its loss

KINDS = {  # of kernels, by words in their names; the first that fits
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "matrix products": ("gemm", "cutlass", "nvjet", "xmma", "cublas"),
    "communication": ("nccl",),
    "optimizer": ("adam",),
    "compiled": ("triton",),
    "copies": ("memcpy", "copy", "cat"),
    "norms": ("norm",),
    "sums": ("reduce",),
}


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The run whose step is timed."""
    raw: dict[str, Any] = {
        "run": {"name": "benchmark"},
        "model": {"name": options.model},
        "data": {"train": "synthetic://shapes?count=512", "mean_tokens": MEAN_TOKENS, "lanes": 1},
        "train": {
            "steps": 1000,
            "global_batch": options.batch * options.accumulation,
            "micro_batch": options.batch,
        },
        "optim": {"lr": LR},
        "engine": {"precision": "bf16" if torch.cuda.is_available() else "fp32"},
    }
    for change in options.changes:
        name, _, value = change.partition("=")
        section, _, key = name.partition(".")
        raw.setdefault(section, {})[key] = parse_yaml(value)
    return recipe_from_dict(raw)


def pictures(count: int, side: int, device: torch.device) -> Tensor:
    """Noise, uint8 [count, 3, side, side], in the memory layout of decoded pictures."""
    noise = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8)
    return noise.permute(0, 3, 1, 2).to(device)


def ours(recipe: Recipe, split: BatchSplit, batches: int) -> Step:
    """The engine's step."""
    from coca_scale.engine.launch import start_world
    from coca_scale.engine.train_engine import TrainEngine
    from coca_scale.model import CoCa, LogitScale
    from coca_scale.model.config import ModelConfig

    world = start_world()
    config = ModelConfig.from_recipe(recipe.model)
    with world.device:
        model = CoCa(config)
    engine = TrainEngine(model, LogitScale(), recipe, split, world)
    text, side, count = config.text, config.vision_cfg.image_size, recipe.train.global_batch
    inputs = [
        (
            pictures(count, side, world.device),
            engine.lay_out(captions(count, text.vocab_size, config.context_length)),
        )
        for _ in range(batches)
    ]

    def step(number: int) -> Callable[[], float]:
        images, laid_out = inputs[number % batches]  # as the prefetching thread hands them over
        flight = engine.step(images, laid_out, LR, number * count)
        return lambda: flight.result().loss

    return step


def theirs(options: argparse.Namespace, batches: int) -> Step:
    """open_clip's model, losses and training step, without its data loading and logging."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = published(options.model)
    is_coca = hasattr(model, "text_decoder")
    pure = options.open_clip == "pure_bf16"
    model = model.to(device, torch.bfloat16 if pure else torch.float32).train()
    model.set_grad_checkpointing(options.grad_checkpointing)
    loss = CoCaLoss(CAPTION_WEIGHT, CONTRASTIVE_WEIGHT, pad_id=0) if is_coca else ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    run = torch.compile(model) if options.compile else model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=not pure)
    side, context = model.visual.image_size, CONTEXT if is_coca else CONTEXT + 1
    side = side[0] if isinstance(side, tuple) else side
    inputs = []
    for _ in range(batches):
        images = pictures(options.batch, side, device).float() / 127.5 - 1
        tokens = captions(options.batch, 49408).to(device)
        tokens = nn.functional.pad(tokens, (0, context - CONTEXT))
        inputs.append((images.bfloat16() if pure else images, tokens))

    def step(number: int) -> Callable[[], float]:
        optimizer.zero_grad()
        with autocast:
            found = run(*inputs[number % batches])
            total = sum(loss(**found)) if is_coca else loss(*found)
        assert isinstance(total, Tensor)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)
        value = total.detach()
        return lambda: float(value)

    return step


def timed(step: Step, warm: int, rounds: int) -> dict[str, Any]:
    """Seconds per step of every round, the first losses, memory."""
    started = time.perf_counter()
    losses = [step(number)() for number in range(warm)]
    synchronize()
    found: dict[str, Any] = {"warm_seconds": time.perf_counter() - started, "losses": losses[:6]}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds, host = [], []
    for number in range(rounds):
        started, busy = time.perf_counter(), time.process_time()
        loss_before: Callable[[], float] | None = None
        for inner in range(STEPS_PER_ROUND):
            loss = step(warm + number * STEPS_PER_ROUND + inner)
            if loss_before is not None:  # as the trainer reads it, with a step before the device
                loss_before()
            loss_before = loss
        synchronize()
        seconds.append((time.perf_counter() - started) / STEPS_PER_ROUND)
        host.append((time.process_time() - busy) / STEPS_PER_ROUND)
    found |= {
        "step_seconds": statistics.median(seconds),
        "spread": [min(seconds), max(seconds)],
        "process_seconds": statistics.median(host),
    }
    if torch.cuda.is_available():
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
        found["reserved_bytes"] = torch.cuda.max_memory_reserved()
        free, total = torch.cuda.mem_get_info()
        found["device_bytes"] = total - free
    return found


def kernels(step: Callable[[], object], path: Path) -> dict[str, Any]:
    """Where the device's time in one step goes."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    busy, end, before = 0.0, events[0].time_range.start, ""
    pauses: list[tuple[float, str, str]] = []  # seconds, kernels before and after
    times: Counter[str] = Counter()
    attention: set[str] = set()
    for event in events:
        start, stop = event.time_range.start, event.time_range.end
        if start > end:
            pauses.append(((start - end) / 1e6, before[:60], event.name[:60]))
        busy += max(0.0, stop - max(start, end))
        if stop > end:
            end, before = stop, event.name
        name = event.name.lower()
        kind = next((k for k, words in KINDS.items() if any(w in name for w in words)), "others")
        times[kind] += stop - start
        if kind == "attention":
            attention.add(event.name[:80])
    averages = profiler.key_averages()
    table = averages.table("self_device_time_total", row_limit=50, max_name_column_width=100)
    path.write_text(table)
    return {
        "kernels": len(events),
        "pauses": sorted(pauses, reverse=True)[:15],
        "busy_seconds": busy / 1e6,
        "seconds_by_kind": {kind: value / 1e6 for kind, value in times.most_common()},
        "attention_kernels": sorted(attention),
    }


def driver() -> str:
    """Of the card."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Measure one case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("changes", nargs="*", metavar="section.key=value", help="of the recipe")
    parser.add_argument("--model", default="coca_ViT-L-14")
    parser.add_argument("--batch", type=int, default=192, help="micro-batch")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--open-clip", choices=["amp_bf16", "pure_bf16"])
    parser.add_argument("--compile", action="store_true", help="open_clip's model as a whole")
    parser.add_argument("--grad-checkpointing", action="store_true", help="open_clip's")
    parser.add_argument("--warm", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    recipe = recipe_of(options)
    split = BatchSplit.from_recipe(recipe, 1)
    step = ours(recipe, split, 4) if options.open_clip is None else theirs(options, 4)
    with GarbageCollection(100):
        times = timed(step, options.warm, options.rounds)
    row: dict[str, Any] = {
        "command": " ".join(["python benchmarks/engine_step.py", *sys.argv[1:]]),
        "who": "coca-scale" if options.open_clip is None else "open_clip",
        "model": options.model,
        "batch": options.batch,
        "accumulation": options.accumulation,
        "engine": recipe.engine.model_dump() if options.open_clip is None else options.open_clip,
        **times,
    }
    samples = options.batch * options.accumulation
    row["samples_per_second"] = samples / row["step_seconds"]
    row["gflop_per_sample"] = model_flops(recipe, split) / 1e9
    if torch.cuda.is_available():
        row["device"], row["driver"] = torch.cuda.get_device_name(), driver()
        peak = peak_flops(row["device"])
        if peak is not None:
            row["mfu"] = 1e9 * row["gflop_per_sample"] * row["samples_per_second"] / peak
        if options.profile is not None:
            row |= kernels(lambda: step(0), options.profile)
    else:
        row["device"] = f"cpu, {os.cpu_count()} cores"
    packages = ("torch", "deepspeed", "open_clip_torch")
    row["versions"] = {"python": platform.python_version(), **{p: version(p) for p in packages}}
    row["date"] = time.strftime("%Y-%m-%d")
    line = json.dumps(row)
    print(line)
    if options.out is not None:
        with options.out.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
