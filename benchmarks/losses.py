"""Both losses against others: seconds and bytes of forward and backward, and their difference.

    python benchmarks/losses.py [--rounds 5] [--out FILE]

Caption loss over captions of 76 tokens of which 20 are real, as a batch has them; contrastive loss
on one rank; in bf16 on a GPU, in fp32 elsewhere. On a GPU Liger, cut cross-entropy and Inf-CL stand
beside them if they are installed (pip install liger-kernel cut-cross-entropy inf_cl). Differences
are relative, of the gradients, from float64.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from timing import medians
from torch import Tensor

from coca_scale.losses import FeatureGather, chunked_cross_entropy, contrastive_loss
from coca_scale.planning.counting import LiveBytes

WIDTH, SCALE = 512, 100.0
ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
SMALL = ((32, 8192), (32, 49408))  # captions, vocabulary
Loss = Callable[..., Tensor]


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All logits at once, of padding as well."""
    return F.cross_entropy(hidden @ weight.T, labels, ignore_index=0, reduction="sum")


def torch_fused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch's own, from 2.15 on."""
    return F.linear_cross_entropy(hidden, weight, labels, ignore_index=0, reduction="sum")


def deepspeed_tiled(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """DeepSpeed's, which wants the owner of the weight."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    owner = torch.nn.Module()
    owner.weight = torch.nn.Parameter(weight.detach())

    def tile(module: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(
            (x @ module.weight.T).flatten(0, -2), y.flatten(), ignore_index=0, reduction="sum"
        )

    shards = max(1, len(hidden) // 2048)
    total: Tensor = TiledFusedLogitsLoss.apply(
        tile, owner, hidden[None], labels[None], None, shards, [owner.weight], "sum"
    )
    return total


def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Liger's kernels (Hsu et al. 2024)."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=0, reduction="sum")
    total: Tensor = loss(weight, hidden, labels)
    return total


def cut(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cut cross-entropy's kernels (Wijmans et al. 2025)."""
    from cut_cross_entropy import linear_cross_entropy

    total: Tensor = linear_cross_entropy(hidden, weight, labels, ignore_index=0, reduction="sum")
    return total


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Real tokens, in chunks."""
    kept = labels != 0
    return chunked_cross_entropy(hidden[kept], weight, labels[kept], chunk_rows=2048)


def ours_in_triton(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same with `loss.caption_kernel: triton`."""
    kept = labels != 0
    return chunked_cross_entropy(
        hidden[kept], weight, labels[kept], chunk_rows=2048, kernel="triton"
    )


def caption_case(captions: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight, labels."""
    generator = torch.Generator().manual_seed(0)
    rows = captions * 75
    hidden = torch.randn(rows, WIDTH, generator=generator)
    weight = torch.randn(vocabulary, WIDTH, generator=generator) * WIDTH**-0.5
    labels = torch.randint(1, vocabulary, (captions, 75), generator=generator)
    labels[:, 19:] = 0
    leaves = (t.to(DEVICE, DTYPE).requires_grad_() for t in (hidden, weight))
    return *leaves, labels.flatten().to(DEVICE)


def run_caption(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """One forward and backward; the gradient of the hidden states."""
    hidden, weight, labels = inputs
    hidden.grad = weight.grad = None
    loss(hidden, weight, labels).backward()
    assert hidden.grad is not None
    return hidden.grad


def our_contrastive(features: Tensor) -> Tensor:
    """One forward and backward; the gradient of the features."""
    gather = FeatureGather(features.detach(), None)
    return contrastive_loss(gather, torch.tensor(SCALE, device=DEVICE).log(), None).grad_features


def open_clip(images: Tensor, texts: Tensor) -> Tensor:
    """All similarities at once."""
    loss: Tensor = ClipLoss()(images, texts, torch.tensor(SCALE, device=DEVICE))
    return loss


def inf_cl(images: Tensor, texts: Tensor) -> Tensor:
    """Inf-CL's kernels on one device (Cheng et al. 2024), in fp32 whatever comes."""
    from inf_cl import cal_flash_loss

    sides = [cal_flash_loss(*pair, scale=SCALE) for pair in ((images, texts), (texts, images))]
    return torch.stack(sides).mean()


def run_contrastive(loss: Loss, features: Tensor) -> Tensor:
    """As `our_contrastive`."""
    features.grad = None
    loss(features[:, 0], features[:, 1]).backward()
    assert features.grad is not None
    return features.grad


def peak(step: Callable[[], object], inputs: list[Tensor]) -> int:
    """Most bytes alive beside the inputs."""
    for tensor in inputs:
        tensor.grad = None
    with LiveBytes() as live:
        live.ignore(inputs)
        step()
    return live.peak


def measured(
    title: dict[str, str],
    steps: dict[str, Callable[[], Tensor]],
    inputs: list[Tensor],
    exact: Tensor,
    rounds: int,
) -> list[dict[str, Any]]:
    """A row for everyone: seconds, bytes, and how far its gradient is from the exact one."""
    seconds = medians(steps, rounds)
    return [
        {
            **title,
            "name": name,
            "seconds": seconds[name],
            "peak_bytes": peak(step, inputs),
            "error": float((step().double() - exact).norm() / exact.norm()),
            "device": torch.cuda.get_device_name() if ON_GPU else "cpu",
            "versions": {"torch": torch.__version__},
            "date": time.strftime("%Y-%m-%d"),
        }
        for name, step in steps.items()
    ]


def caption_losses(rounds: int) -> list[dict[str, Any]]:
    """Every loss on every size."""
    losses: dict[str, Loss] = {"coca-scale": ours, "naive": naive, "DeepSpeed": deepspeed_tiled}
    if hasattr(F, "linear_cross_entropy"):
        losses["torch"] = torch_fused
    if ON_GPU:
        losses["coca-scale, Triton"] = ours_in_triton
    if ON_GPU and find_spec("liger_kernel") is not None:
        losses["Liger"] = liger
    if ON_GPU and find_spec("cut_cross_entropy") is not None:
        losses["cut cross-entropy"] = cut
    rows = []
    for captions, vocabulary in ((192, 49408), (512, 49408)) if ON_GPU else SMALL:
        inputs = caption_case(captions, vocabulary)
        wide = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in inputs[:2])
        exact = run_caption(ours, (*wide, inputs[2]))
        steps = {name: partial(run_caption, loss, inputs) for name, loss in losses.items()}
        title = {"loss": "caption", "size": f"{captions} captions, vocabulary {vocabulary}"}
        rows += measured(title, steps, list(inputs), exact, rounds)
    return rows


def contrastive_losses(rounds: int) -> list[dict[str, Any]]:
    """Every loss on every size."""
    losses: dict[str, Loss] = {"open_clip": open_clip}
    if ON_GPU and find_spec("inf_cl") is not None:
        losses["Inf-CL"] = inf_cl
    rows = []
    for batch in (4096, 16384) if ON_GPU else (1024, 4096):
        features = F.normalize(torch.randn(batch, 2, WIDTH, device=DEVICE), dim=-1)
        features = features.to(DTYPE).requires_grad_()
        exact = our_contrastive(features.detach().double())
        steps = {name: partial(run_contrastive, loss, features) for name, loss in losses.items()}
        steps = {"coca-scale": partial(our_contrastive, features), **steps}
        title = {"loss": "contrastive", "size": f"batch {batch}"}
        rows += measured(title, steps, [features], exact, rounds)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    before = ""
    for row in rows:
        title = f"{row['loss']} loss, {row['size']}"
        if title != before:
            print(title)
            before = title
        print(
            f"  {row['name']:<20}{1e3 * row['seconds']:10.2f} ms"
            f"{row['peak_bytes'] / 2**20:10.0f} MiB"
            f"   gradient off by {row['error']:.0e}"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = caption_losses(options.rounds) + contrastive_losses(options.rounds)
    show(rows)
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
