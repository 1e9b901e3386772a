"""Training images per second and core: this loader beside OpenCLIP's webdataset pipeline.

Both read the same shards of 512 px JPEGs in one process, crop, resize to 224 px, tokenize and stack
batches. OpenCLIP's pipeline is built from webdataset as open_clip_train/data.py builds it, with
open_clip's own transform and tokenizer. Ours gives uint8 (normalised on the device), theirs float.

    python benchmarks/loader.py --out benchmarks/results/loader_cpu.json

With `--workers 1 8 16` also what so many loader processes of ours give together.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import webdataset as wds
from PIL import Image

from coca_scale.data.loader import TrainDataset, TrainLoader, deal_lanes
from coca_scale.data.pack import PackOptions, pack
from coca_scale.data.sources import open_source, train_crop
from coca_scale.data.tokens import ClipTokenizer
from coca_scale.recipe.data import DataSection

BATCH = 64
SIZE = 224
CONTEXT = 77


def photo(rng: np.random.Generator, side: int) -> Image.Image:
    """Noise in octaves, in colour: about as many bytes as a photograph of this size."""
    total = np.zeros((side, side, 3), np.float32)
    for octave in range(2, 10):
        cells = 2**octave
        noise = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        grown = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
        total += np.asarray(grown, np.float32) / cells**0.7
    total -= total.min()
    return Image.fromarray((total * (255 / total.max())).astype(np.uint8))


def write_data(folder: Path, count: int, side: int) -> str:
    """Shards of `count` JPEGs at quality 90; returns their pattern."""
    rng = np.random.default_rng(0)
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(count):
        photo(rng, side).save(pictures / f"{number:05d}.jpg", quality=90)
        (pictures / f"{number:05d}.txt").write_text(f"a picture of nothing, number {number}")
    pack(pictures, folder / "shards", PackOptions(shard_samples=count // 4))
    return str(folder / "shards")


def ours(shards: str, workers: int = 0) -> Iterator[torch.Tensor]:
    """Batches of the loader of coca-scale."""
    data = DataSection(train=shards)
    lanes = max(4, workers)
    dataset = TrainDataset(
        source=open_source(shards, data, 0),
        tokenizer=ClipTokenizer(CONTEXT),
        crop=train_crop(data, SIZE),
        seed=0,
        lanes=lanes,
        samples_per_lane=BATCH // 4,
        states=deal_lanes(lanes, 0, 1, None),
    )
    for batch in TrainLoader(dataset, workers):
        yield batch.images


def theirs(shards: str) -> Iterator[torch.Tensor]:
    """Batches of OpenCLIP's pipeline."""
    urls = [str(path) for path in sorted(Path(shards).glob("*.tar"))]
    transform = open_clip.image_transform(SIZE, is_train=True)
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    while True:
        pipeline = wds.DataPipeline(
            wds.SimpleShardList(urls),
            wds.tarfile_to_samples(),
            wds.shuffle(128),
            wds.select(lambda s: "txt" in s and "jpg" in s),
            wds.decode("pilrgb"),
            wds.rename(image="jpg;png;jpeg;webp", text="txt"),
            wds.map_dict(image=transform, text=lambda text: tokenizer(text)[0]),
            wds.to_tuple("image", "text"),
            wds.batched(BATCH, partial=False),
        )
        for images, _ in pipeline:
            yield images


def measure(shards: str, batches: int, rounds: int) -> dict[str, Any]:
    """Medians of alternating rounds, after one round to warm up."""
    rates: dict[str, list[float]] = {"coca_scale": [], "open_clip": []}
    streams = {"coca_scale": ours(shards), "open_clip": theirs(shards)}
    for _ in range(rounds + 1):
        for name, stream in streams.items():
            started = time.perf_counter()
            for images in islice(stream, batches):
                assert images.shape == (BATCH, 3, SIZE, SIZE)
            rates[name].append(batches * BATCH / (time.perf_counter() - started))
    medians = {name: statistics.median(values[1:]) for name, values in rates.items()}
    return {
        "images_per_second_per_core": medians,
        "ratio": medians["coca_scale"] / medians["open_clip"],
        "ratios_by_round": [
            a / b for a, b in zip(rates["coca_scale"][1:], rates["open_clip"][1:], strict=True)
        ],
    }


def together(shards: str, workers: int, seconds: float) -> float:
    """Images per second of some loader processes, once all of them are at work."""
    stream = ours(shards, workers)
    for _ in islice(stream, 8):
        pass
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        count += len(next(stream))
    return count / (time.perf_counter() - started)


def processor() -> str:
    """What this machine computes with, and how many cores of it there are."""
    info = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*: (.*)", info)
    return f"{name[1] if name else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def memory(shards: str, batches: int) -> list[int]:
    """Resident megabytes after each tenth of a long run of the loader alone."""
    stream = ours(shards)
    found = []
    for _ in range(10):
        for _ in islice(stream, batches // 10):
            pass
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found.append(pages * resource.getpagesize() // 2**20)
    return found


def show(result: dict[str, Any], out: Path | None) -> None:
    """Print a result, and write it to a file."""
    text = json.dumps(result, indent=1)
    print(text)
    if out is not None:
        out.write_text(text + "\n")


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", type=int, default=512, help="pixels of the JPEGs")
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--batches", type=int, default=8, help="per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, nargs="*", help="loader processes, together")
    parser.add_argument("--memory-batches", type=int, default=0, help="of a long run, for memory")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        shards = write_data(Path(name), arguments.pictures, arguments.side)
        size = sum(path.stat().st_size for path in Path(shards).glob("*.tar"))
        result = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{processor()}, 1 process, 1 thread",
            "versions": {p: version(p) for p in ("pillow", "webdataset", "open_clip_torch")},
            "jpeg": {"side": arguments.side, "mean_bytes": size // arguments.pictures},
            "output_side": SIZE,
            **measure(shards, arguments.batches, arguments.rounds),
        }
        if arguments.workers:
            result["images_per_second_by_workers"] = {
                str(workers): together(shards, workers, 5.0) for workers in arguments.workers
            }
        if arguments.memory_batches:
            result["resident_megabytes"] = memory(shards, arguments.memory_batches)
            result["samples_of_memory_run"] = arguments.memory_batches * BATCH
    show(result, arguments.out)


if __name__ == "__main__":
    main()
