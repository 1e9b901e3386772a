"""What a step costs beside the device's arithmetic: the host's work, and launches and bytes.

    python benchmarks/host_step.py [--out FILE] [engine.compile=blocks ...]

The host: the engine's whole step on one CPU rank, of the modules of coca_ViT-L-14 at widths so
small that computing takes next to nothing, in bf16 (stage 0: fp32): milliseconds of the process's
own time, calls of functions as Python's profiler counts them, values read back from the device
before the step's result is asked for. The device: operations that are a kernel each, and the bytes
that go in and out of them, for a forward and backward pass of the real model on tensors without
data; what a compiler fuses is not seen. One JSON line for each case.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import json
import os
import platform
import pstats
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import coca_scale.model.attention_kernel  # noqa: F401 - defines the operation
from coca_scale.engine.launch import start_world
from coca_scale.engine.train_engine import TrainEngine
from coca_scale.engine.world import World
from coca_scale.losses import FeatureGather, contrastive_loss
from coca_scale.model import CoCa, LogitScale, load_model_config
from coca_scale.model.config import ModelConfig
from coca_scale.model.layers import CrossAttention, SelfAttention
from coca_scale.planning.costs import caption_quantiles
from coca_scale.recipe import BatchSplit, load_recipe

SAMPLES, SIDE, STEPS = 2, 28, 12
HOST_CASES = ((0, 1), (2, 1), (3, 1), (3, 8))  # stage, accumulation
DEVICE_CASES = (("coca_ViT-L-14", 192), ("coca_ViT-B-32", 512))
READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
NOT_KERNELS = {
    *("empty", "empty_like", "new_empty", "empty_strided", "detach", "alias", "lift_fresh"),
    *("_unsafe_view", "_reshape_alias", "is_same_size", "device"),
}


class Operations(TorchDispatchMode):
    """Counts what runs on the device, and what is read from it."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.bytes = self.reads = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run and count."""
        out = func(*args, **(kwargs or {}))
        self.reads += func in READS
        if not func.is_view and func.overloadpacket.__name__ not in NOT_KERNELS:
            self.kernels += 1
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.bytes += sum(map(_bytes, tensors))
        return out


def _bytes(tensor: Tensor) -> int:
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    elements = 1
    for size, stride in sizes:
        elements *= size if stride else 1
    return elements * tensor.element_size()


def thin(folder: Path) -> str:
    """A config with the modules of coca_ViT-L-14."""
    raw = json.loads(files("coca_scale.model").joinpath("configs/coca_ViT-L-14.json").read_text())
    raw["embed_dim"] = 64
    raw["vision_cfg"].update(width=64, image_size=SIDE, head_width=16, attn_pooler_heads=4)
    raw["text_cfg"].update(width=64, heads=4, vocab_size=512)
    raw["multimodal_cfg"].update(width=64, heads=4, vocab_size=512, attn_pooler_heads=4)
    path = folder / "thin.json"
    path.write_text(json.dumps(raw))
    return str(path)


def host(
    world: World, model: str, stage: int, accumulation: int, changes: list[str]
) -> dict[str, Any]:
    """One case of the host."""
    total = SAMPLES * accumulation
    recipe = load_recipe(
        "recipes/tiny.yaml",
        [
            *(f"model.name={model}", f"train.global_batch={total}", f"engine.zero_stage={stage}"),
            *(f"train.micro_batch={SAMPLES}", "data.lanes=1", "run.dir=/nowhere"),
            *(f"engine.precision={'bf16' if stage else 'fp32'}", *changes),
        ],
    )
    torch.manual_seed(0)
    config = ModelConfig.from_recipe(recipe.model)
    split = BatchSplit.from_recipe(recipe, 1)
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        engine = TrainEngine(CoCa(config), LogitScale(), recipe, split, world)
    images = torch.randint(0, 256, (total, 3, SIDE, SIDE), dtype=torch.uint8)
    tokens = caption_quantiles(total, 10.0, config.context_length, config.pad_id)
    captions = engine.lay_out(tokens)

    def step() -> Any:
        return engine.step(images, captions, 1e-4)

    for _ in range(4):  # DeepSpeed records an order, compilers compile
        step().result()
    seconds = [_process_seconds(lambda: step().result()) for _ in range(STEPS)]
    with Operations() as seen:
        flight = step()
    flight.result()
    with cProfile.Profile() as profile:
        step().result()
    engine.close()
    return {
        "case": "host",
        "zero_stage": stage,
        "accumulation": accumulation,
        "host_ms": statistics.median(seconds) * 1e3,
        "host_ms_quartiles": [q * 1e3 for q in statistics.quantiles(seconds)[::2]],
        "python_calls": pstats.Stats(profile).total_calls,  # type: ignore[attr-defined]
        "device_reads": seen.reads,
    }


def _process_seconds(action: Callable[[], object]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started


def device(name: str, samples: int, own_attention: bool) -> dict[str, Any]:
    """One case of the device: a micro-batch forward and backward, contrastive loss included."""
    config = load_model_config(name)
    tokens = caption_quantiles(samples, 20.0, config.context_length, config.pad_id)
    before = torch.get_default_dtype()
    with FakeTensorMode() as fake:
        torch.set_default_dtype(torch.bfloat16)
        model = CoCa(config).train()
        torch.set_default_dtype(before)
        side = config.vision_cfg.image_size
        images = torch.empty(samples, 3, side, side, dtype=torch.bfloat16)
    for module in model.modules():
        if isinstance(module, SelfAttention) and own_attention:
            module.kernel = lambda qkv, heads: torch.ops.coca_scale.short_attention(qkv, heads)[0]
        if isinstance(module, SelfAttention | CrossAttention):
            module.varlen = own_attention
    model.set_activation_checkpointing("selective")
    captions = model.text.pack(tokens).map(fake.from_tensor)
    with fake, Operations() as seen:
        features, sums = model(images, captions)
        gather = FeatureGather(features.detach(), None)
        terms = contrastive_loss(gather, torch.zeros(()), None)
        surrogate = (features.float() * terms.grad_features).sum() + 2 * sums["caption"]
        surrogate.backward()
    return {
        "case": "device",
        "model": name,
        "samples": samples,
        "attention": "own" if own_attention else "torch",
        "kernels": seen.kernels,
        "gigabytes": seen.bytes / 1e9,
    }


def main() -> None:
    """All cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a JSON list, made longer")
    parser.add_argument("--host-only", action="store_true", help="count nothing of the device")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="of the host's recipe")
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = {
        "commit": _commit(),
        "changes": options.changes,
        "hardware": f"{platform.machine()}, 1 thread",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    rows = []
    world = start_world()
    with tempfile.TemporaryDirectory() as folder:
        model = thin(Path(folder))
        for stage, accumulation in HOST_CASES:
            rows.append(host(world, model, stage, accumulation, options.changes))
            print(json.dumps(rows[-1]))
    if not options.host_only:
        for name, samples in DEVICE_CASES:
            for own in (False, True):
                rows.append(device(name, samples, own))
                print(json.dumps(rows[-1]))
    if options.out is not None:
        known = json.loads(options.out.read_text()) if options.out.exists() else []
        known += [{**row, **about} for row in rows]
        options.out.write_text(json.dumps(known, indent=1) + "\n")


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
