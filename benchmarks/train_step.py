"""One training step, ours and open_clip's side by side: seconds, and bytes saved for backward.

    python benchmarks/train_step.py [--model coca_ViT-B-32] [--batch 32] [--rounds 3] [--out FILE]

Same weights, same images, same captions (length of a caption: start and end token and a Poisson
number of words of mean 18, so 20 tokens on average, padded to the model's context by both). fp32 on
the CPU, bf16 on a GPU. A step is forward, both losses and backward; the rounds alternate between
the two so that a noisy machine hits both, and medians are reported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
from open_clip.loss import CoCaLoss
from torch import Tensor

from coca_scale.losses import FeatureGather, contrastive_loss
from coca_scale.model import load_model_config
from coca_scale.model.weights import build_model
from coca_scale.openclip.names import from_openclip

MEAN_WORDS = 18.0
CONTRASTIVE_WEIGHT, CAPTION_WEIGHT = 1.0, 2.0


def captions(batch: int, length: int, vocabulary: int) -> Tensor:
    """Padded token ids [batch, length] with a realistic spread of lengths."""
    words = torch.poisson(torch.full((batch,), MEAN_WORDS)).int().clamp(1, length - 2)
    tokens = torch.zeros(batch, length, dtype=torch.long)
    for row, count in enumerate((words + 2).tolist()):
        tokens[row, :count] = torch.randint(1, vocabulary, (count,))
    return tokens


def saved_bytes(step: Callable[[], None], parameters: list[Tensor]) -> int:
    """Distinct bytes that autograd keeps during one step, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="coca_ViT-B-32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    config = load_model_config(options.model)
    theirs = open_clip.create_model(options.model)
    torch.nn.init.normal_(theirs.text_decoder.text_projection, std=0.03)
    model = build_model(
        config, {k: v.clone() for k, v in from_openclip(theirs.state_dict()).items()}
    )
    ours = model.coca.train().requires_grad_(True).to(device, dtype)
    log_scale = model.logit_scale.log_scale.to(device)
    theirs = theirs.train().to(device, dtype)
    size = config.vision_cfg.image_size
    images = torch.randn(options.batch, 3, size, size, device=device, dtype=dtype)
    tokens = captions(options.batch, config.context_length, config.text_cfg.vocab_size).to(device)
    their_loss = CoCaLoss(CAPTION_WEIGHT, CONTRASTIVE_WEIGHT, pad_id=0)
    real = int((tokens[:, 1:] != 0).sum())
    losses: dict[str, float] = {}

    def our_step() -> None:
        ours.zero_grad(set_to_none=True)
        features, caption_sum = ours(images, tokens)
        gather = FeatureGather(features.detach(), None)
        result = contrastive_loss(gather, log_scale, None, chunk_rows=512)
        weighted = CONTRASTIVE_WEIGHT * result.grad_features
        surrogate = (features.to(weighted.dtype) * weighted).sum()
        (surrogate + CAPTION_WEIGHT * caption_sum / real).backward()
        caption = CAPTION_WEIGHT * float(caption_sum.detach()) / real
        losses["coca-scale"] = CONTRASTIVE_WEIGHT * float(result.loss) + caption

    def their_step() -> None:
        theirs.zero_grad(set_to_none=True)
        total = sum(their_loss(**theirs(images, tokens)))
        total.backward()
        losses["open_clip"] = float(total.detach())

    steps = {"coca-scale": our_step, "open_clip": their_step}
    parameters = [*ours.parameters(), *theirs.parameters()]
    table: dict[str, dict[str, float]] = {}
    for name, step in steps.items():
        step()
        table[name] = {"saved_bytes": saved_bytes(step, parameters), "loss": losses[name]}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    for name, row in table.items():
        row["step_seconds"] = statistics.median(seconds[name])
        print(
            f"{name:<12}{row['step_seconds']:8.2f} s  {row['saved_bytes'] / 2**20:10,.1f} MiB saved"
            f"  loss {row['loss']:.5f}"
        )
    mine, other = table["coca-scale"], table["open_clip"]
    print(
        f"ratio       {mine['step_seconds'] / other['step_seconds']:8.2f}    "
        f"{mine['saved_bytes'] / other['saved_bytes']:10.2f}"
    )
    if options.out is not None:
        about = {
            "model": options.model,
            "batch": options.batch,
            "rounds": options.rounds,
            "dtype": str(dtype),
            "mean_tokens": real / options.batch + 1,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "open_clip": open_clip.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "results": table,
        }
        options.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
