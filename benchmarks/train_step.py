"""A training step of four models side by side: our CoCa and CLIP, and open_clip's.

    python benchmarks/train_step.py [--model ViT-B-32] [--batch 32] [--rounds 5] [--out FILE]

Both CoCas have the same weights, and so have both CLIPs. All see the same images and captions:
start and end token and a Poisson number of words of mean 18, so 20 tokens on average; open_clip
pads them to 76 (CLIP: 77). fp32 on the CPU, bf16 on a GPU. A step is forward, losses and backward.
FLOPs and bytes are counted, not timed: bytes are those that the forward pass leaves for the
backward pass. `--rounds 0` counts only. A GPU adds the peak of its memory, weights and gradients
included, and the share of its FLOPs that is used (MFU). `--profile` writes where the time of our
CoCa goes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.loss import ClipLoss, CoCaLoss
from timing import medians
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from coca_scale.losses import FeatureGather, contrastive_loss
from coca_scale.model import load_model_config
from coca_scale.model.weights import build_model
from coca_scale.openclip.state_dict import from_openclip
from coca_scale.planning.costs import caption_quantiles
from coca_scale.planning.counting import LiveBytes, flops, parts
from coca_scale.planning.gpus import peak_flops

MEAN_TOKENS = 20.0
CONTRASTIVE_WEIGHT, CAPTION_WEIGHT = 1.0, 2.0
CONTEXT = 76


class Contender:
    """A model under training.

    Attributes:
        name: what it is called in tables.
        parameters: its weights.
        parts: its modules under common names.
        forward: one forward pass with losses; returns what to call backward on.
        loss: the loss of the last pass.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        parts: dict[str, nn.Module | None],
        forward: Callable[[], tuple[Tensor, float]],
    ) -> None:
        self.name, self.parts = name, parts
        self.parameters = list(module.parameters())
        self.module, self.forward = module, forward
        self.loss = 0.0

    def step(self) -> None:
        """Forward, losses, backward."""
        self.module.zero_grad(set_to_none=True)
        surrogate, self.loss = self.forward()
        surrogate.backward()

    def count(self) -> dict[str, Any]:
        """FLOPs of a step, bytes kept for its backward pass by part, and most bytes alive."""
        self.step()
        for parameter in self.parameters:
            parameter.grad = None
        with LiveBytes() as live:
            live.ignore([*self.parameters, *self.module.buffers()])
            with parts(live, self.parts):
                surrogate, _ = self.forward()
            kept = live.by_part()
            surrogate.backward()
            peak = live.peak
        return {
            "flops": flops(self.step),
            "saved_bytes": sum(kept.values()),
            "saved_bytes_by_part": kept,
            "peak_bytes": peak,
            "loss": self.loss,
        }


def captions(batch: int, vocabulary: int, context: int = CONTEXT) -> Tensor:
    """Token ids [batch, context], of lengths as `coca-scale plan` takes them, in random order."""
    real = caption_quantiles(batch, MEAN_TOKENS, context, pad_id=0)[torch.randperm(batch)] != 0
    tokens = torch.randint(1, vocabulary - 2, real.shape) * real
    tokens[:, 0] = vocabulary - 2
    tokens[torch.arange(batch), real.sum(1) - 1] = vocabulary - 1
    return tokens


def published(name: str) -> Any:
    """open_clip's model with fresh weights, the same every time."""
    torch.manual_seed(0)
    theirs = open_clip.create_model(name)
    if hasattr(theirs, "text_decoder"):  # open_clip leaves this uninitialised
        nn.init.normal_(theirs.text_decoder.text_projection, std=0.03)
    return theirs


def contenders(model: str, batch: int, checkpointing: str) -> dict[str, Callable[[], Contender]]:
    """What builds each of the four; they are large, so only those that are needed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    config = load_model_config(f"coca_{model}")
    size = config.vision_cfg.image_size
    images = torch.randn(batch, 3, size, size, device=device, dtype=dtype)
    torch.manual_seed(1)
    tokens = captions(batch, config.text.vocab_size)

    def ours(name: str, kind: str) -> Contender:
        weights = from_openclip(published(name).state_dict())
        built = build_model(load_model_config(name), weights)
        coca = built.coca.train().requires_grad_(True).to(device, dtype)
        coca.set_activation_checkpointing(checkpointing)
        log_scale = built.logit_scale.log_scale.to(device)
        return _ours(f"coca-scale {kind}", coca, log_scale, images, tokens)

    def theirs(name: str, kind: str) -> Contender:
        module = published(name).train().to(device, dtype)
        return _theirs(f"open_clip {kind}", module, kind == "CoCa", images, tokens.to(device))

    return {
        f"{who} {kind}": partial(build, name, kind)
        for kind, name in (("CoCa", f"coca_{model}"), ("CLIP", model))
        for who, build in (("coca-scale", ours), ("open_clip", theirs))
    }


def _ours(name: str, coca: Any, log_scale: Tensor, images: Tensor, tokens: Tensor) -> Contender:
    def forward() -> tuple[Tensor, float]:
        batch = coca.text.pack(tokens).to(images.device)
        features, sums = coca(images, batch)
        gather = FeatureGather(features.detach(), None)
        result = contrastive_loss(gather, log_scale, None)
        weighted = CONTRASTIVE_WEIGHT * result.grad_features
        surrogate = (features.to(weighted.dtype) * weighted).sum()
        loss = CONTRASTIVE_WEIGHT * float(result.loss)
        if "caption" in sums:
            caption = CAPTION_WEIGHT * sums["caption"] / len(batch.labels_K)
            surrogate, loss = surrogate + caption, loss + float(caption.detach())
        return surrogate, loss

    named = {"image": coca.image, "text": coca.text, "decoder": coca.decoder}
    return Contender(name, coca, {**named, "caption head": coca.caption_head}, forward)


def _theirs(name: str, model: Any, is_coca: bool, images: Tensor, tokens: Tensor) -> Contender:
    loss = CoCaLoss(CAPTION_WEIGHT, CONTRASTIVE_WEIGHT, pad_id=0) if is_coca else ClipLoss()
    text = tokens if is_coca else nn.functional.pad(tokens, (0, 1))

    def forward() -> tuple[Tensor, float]:
        total = sum(loss(**model(images, text))) if is_coca else loss(*model(images, text))
        return total, float(total.detach())

    named: dict[str, nn.Module | None] = {"image": model.visual}
    if is_coca:
        named |= {"text": model.text, "decoder": model.text_decoder}
    else:
        named |= {"text": model.transformer}
    return Contender(name, model, named, forward)


def device_peak(build: Callable[[], Contender]) -> tuple[Contender, int]:
    """A contender, and most bytes of the GPU that it takes for a step, beside what was there."""
    before = torch.cuda.memory_allocated()
    runner = build()
    runner.step()  # libraries take their own memory at the first step
    torch.cuda.reset_peak_memory_stats()
    runner.step()
    found = torch.cuda.max_memory_allocated() - before
    runner.module.zero_grad(set_to_none=True)
    return runner, found


def write_profile(step: Callable[[], object], path: Path) -> None:
    """The operations of a step that take longest, as a table; beside it a trace for Perfetto."""
    kinds = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(ProfilerActivity.CUDA)
    step()
    with profile(activities=kinds) as profiler:
        step()
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    path.write_text(profiler.key_averages().table(sort_by=key, row_limit=30))
    profiler.export_chrome_trace(str(path.with_suffix(".json")))


def compare(
    model: str, batch: int, rounds: int, checkpointing: str, profile_to: Path | None = None
) -> dict[str, Any]:
    """Count and time all four; write a profile of the first."""
    builders = contenders(model, batch, checkpointing)
    table: dict[str, dict[str, Any]] = {}
    runners: dict[str, Contender] = {}
    on_gpu = torch.cuda.is_available()
    for name, build in builders.items():
        runner, peak = device_peak(build) if on_gpu else (build(), None)
        table[name] = runner.count()
        if peak is not None:
            table[name]["device_peak_bytes"] = peak
        if rounds:
            runners[name] = runner
        if profile_to is not None:
            write_profile(runner.step, profile_to)
            profile_to = None
    device = torch.cuda.get_device_name() if on_gpu else platform.machine()
    per_second = peak_flops(device)
    if rounds:
        for name, seconds in medians({n: r.step for n, r in runners.items()}, rounds).items():
            table[name]["step_seconds"] = seconds
            table[name]["samples_per_second"] = batch / seconds
            if per_second is not None:
                table[name]["mfu"] = table[name]["flops"] / seconds / per_second
    return {
        "model": model,
        "batch": batch,
        "rounds": rounds,
        "activation_checkpointing": checkpointing,
        "dtype": "bf16" if on_gpu else "fp32",
        "mean_tokens": float((captions(batch, 49408) != 0).sum()) / batch,
        "device": device,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "results": table,
    }


def show(found: dict[str, Any]) -> None:
    """Print a table."""
    base = found["results"]["open_clip CLIP"]
    print(
        f"{found['model']}, batch {found['batch']}, {found['mean_tokens']:.1f} tokens, "
        f"{found['dtype']}, recompute {found['activation_checkpointing']}; "
        "× is against open_clip's CLIP"
    )
    for name, row in found["results"].items():
        line = f"  {name:<16}"
        for key, unit, label in (
            ("flops", 1e9 * found["batch"], "GFLOP/sample"),
            ("saved_bytes", 2**20 * found["batch"], "MiB/sample kept"),
            ("device_peak_bytes", 2**30, "GiB at most"),
            ("step_seconds", 1, "s"),
        ):
            if key in row:
                line += f"{row[key] / unit:9.2f} {label} ({row[key] / base[key]:.2f}×)"
        if "mfu" in row:
            line += f"   MFU {row['mfu']:.0%}"
        print(line, flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B-32", help="ViT-B-32 or ViT-L-14")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpointing", default="selective", help="none, selective or full")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--profile", type=Path, help="a table, FILE.txt, and a trace, FILE.json")
    options = parser.parse_args()
    arguments = (options.model, options.batch, options.rounds, options.checkpointing)
    found = compare(*arguments, options.profile)
    show(found)
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
