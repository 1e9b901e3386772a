"""What a start takes: memory of a node while the model comes, and a checkpoint of another layout.

    python benchmarks/start.py [--out FILE] [--layers 2] [--ranks 1 8]

The model has the widths of coca_2b and fewer layers. Memory is what processes have for themselves
(RssAnon), sampled every 10 ms from before the model until its weights are where the engine wants
them, less what they had before, added up over the ranks; what an engine takes then is a device's.
`whole` builds the model on every rank, as it was before weights were drawn one at a time.

The checkpoint is written by two ranks at ZeRO stage 3 with AdamW's state. `slices` is what one of
four ranks reads of it to go on; `converter` is DeepSpeed's ds_to_universal with its own settings,
which all ranks would wait for. Files are read from the disk (their pages are dropped before) and
once more from memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from coca_scale.engine.config import deepspeed_config, transfers
from coca_scale.engine.launch import end_world, start_world
from coca_scale.engine.train_engine import TrainEngine
from coca_scale.engine.zero_slices import SavedState
from coca_scale.engine.zero_start import fill
from coca_scale.model import CoCa, LogitScale
from coca_scale.model.config import ModelConfig, load_model_config, parse_model_config
from coca_scale.model.deferred import Drawn, deferred
from coca_scale.recipe import BatchSplit, Recipe, recipe_from_dict

SAMPLE_SECONDS = 0.01
NEW_RANKS = 4
FULL_RANKS = 512


def main() -> None:
    """Measure, print rows, and write them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, default=2, help="of the image tower; half of others")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8])
    options = parser.parse_args()
    rows = []
    for ranks in options.ranks:
        for how in ("whole", "drawn"):
            rows.append(memory_row(how, ranks, options.layers))
            print(json.dumps(rows[-1]))
    rows += reshard_rows(options.layers)
    about = {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": version("torch"),
        "deepspeed": version("deepspeed"),
        "python": platform.python_version(),
        "date": datetime.now().date().isoformat(),
    }
    if options.out is not None:
        text = json.dumps([{**row, **about} for row in rows], indent=1)
        options.out.write_text(text + "\n")


def model_of(layers: int) -> ModelConfig:
    """coca_2b with fewer layers."""
    raw = load_model_config("coca_2b").to_dict()
    raw["vision_cfg"]["layers"] = layers
    raw["text_cfg"]["layers"] = raw["multimodal_cfg"]["layers"] = max(1, layers // 2)
    return parse_model_config(raw, "coca_2b")


def recipe_of(ranks: int) -> Recipe:
    """One sample on each rank."""
    return recipe_from_dict(
        {
            "run": {"name": "start"},
            "model": {"name": "coca_2b"},
            "data": {"train": "synthetic://shapes?count=64&size=48"},
            "optim": {"lr": 1e-3},
            "train": {"steps": 1, "global_batch": ranks, "micro_batch": 1},
            "engine": {"precision": "bf16"},
        }
    )


class OwnMemory:
    """Most memory that this process had for itself while the block ran, beyond what it had."""

    def __enter__(self) -> OwnMemory:
        self._before = self.most = _own_bytes()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.most -= self._before

    def _look(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self.most = max(self.most, _own_bytes())


def _own_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def on_ranks(function: Any, ranks: int, *args: Any) -> list[Any]:
    """Results of `function(world, *args)` on ranks of this machine."""
    context = mp.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        mp.spawn(_rank, (function, ranks, results, args), nprocs=ranks)
        return [results[rank] for rank in range(ranks)]


def _rank(rank: int, function: Any, ranks: int, results: Any, args: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29391"}
    torch.set_num_threads(1)
    world = start_world(600)
    results[rank] = function(world, *args)
    world.barrier()
    end_world()


def _start(world: Any, how: str, layers: int) -> tuple[int, int, float]:
    """Own memory, the model's bytes in fp32, and seconds."""
    config, recipe = model_of(layers), recipe_of(world.size)
    split = BatchSplit.from_recipe(recipe, world.size)
    world.barrier()
    started = time.perf_counter()
    with OwnMemory() as memory:
        first = None
        if how == "whole":
            torch.manual_seed(0)
            model = CoCa(config)
        else:
            with deferred() as record:
                model = CoCa(config)
            first = Drawn(record, 0)
        elements = sum(p.numel() for p in model.parameters())
        wanted = deepspeed_config(recipe, split, transfers(model), world.size)
        fill(model, first, wanted, torch.bfloat16, world.device)
        seconds = time.perf_counter() - started
        world.barrier()
    return memory.most, 4 * elements, seconds


def memory_row(how: str, ranks: int, layers: int) -> dict[str, Any]:
    """Memory of a start on one machine."""
    found = on_ranks(_start, ranks, how, layers)
    total, size = sum(own for own, _, _ in found), found[0][1]
    return {
        "case": "memory at the start",
        "how": how,
        "ranks": ranks,
        "model_bytes": size,
        "own_bytes": total,
        "copies": round(total / size, 2),
        "seconds": round(max(seconds for _, _, seconds in found), 2),
    }


def _write(world: Any, folder: str, layers: int) -> None:
    config, recipe = model_of(layers), recipe_of(world.size)
    split = BatchSplit.from_recipe(recipe, world.size)
    with deferred() as record:
        model = CoCa(config)
    engine = TrainEngine(model, LogitScale.of(config), recipe, split, world, first=Drawn(record, 0))
    size = config.vision_cfg.image_size
    tokens = torch.full((1, config.context_length), 5)
    captions = engine.lay_out(tokens)
    engine.step(torch.zeros(1, 3, size, size, dtype=torch.uint8), captions, 1e-3).result()
    engine.save_state(Path(folder)).result()


def reshard_rows(layers: int) -> list[dict[str, Any]]:
    """Reading a checkpoint of two ranks into four."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder, universal = Path(name) / "step", Path(name) / "universal"
        folder.mkdir()
        on_ranks(_write, 2, str(folder), layers)
        size = sum(path.stat().st_size for path in folder.rglob("*optim_states.pt"))
        rows = []
        for pages in ("from the disk", "from memory"):
            if pages == "from the disk":
                _drop_pages(folder)
            started = time.perf_counter()
            read, opening = _read_slices(folder)
            seconds = time.perf_counter() - started
            rows.append(_reshard_row("slices", pages, read, seconds, opening))
            print(json.dumps(rows[-1]))
        _drop_pages(folder)
        started = time.perf_counter()
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
        command += ["--input_folder", str(folder / "state"), "--output_folder", str(universal)]
        subprocess.run([*command, "--inject_missing_state"], check=True, capture_output=True)
        seconds = time.perf_counter() - started
        written = sum(path.stat().st_size for path in universal.rglob("*") if path.is_file())
        rows.append({**_reshard_row("converter", "from the disk", size, seconds, 0.0)})
        rows[-1]["bytes_written_and_kept"] = written
        print(json.dumps(rows[-1]))
        shutil.rmtree(universal)
    return rows


def _reshard_row(how: str, pages: str, read: int, seconds: float, opening: float) -> dict[str, Any]:
    rate = read / max(1e-9, seconds - opening)
    row = {"case": "another layout", "how": how, "pages": pages, "bytes": read}
    row |= {"seconds": round(seconds, 3), "opening_seconds": round(opening, 3)}
    row |= {"bytes_per_second": round(rate)}
    if how == "slices":
        full = 12 * sum(p.numel() for p in _full_model().parameters()) / FULL_RANKS
        row |= {"coca_2b_bytes_of_each_of_512": round(full)}
        row |= {"coca_2b_seconds_at_512": round(opening + full / rate, 2)}
    return row


def _full_model() -> CoCa:
    with torch.device("meta"):
        return CoCa(load_model_config("coca_2b"))


def _read_slices(folder: Path) -> tuple[int, float]:
    """What rank 1 of four reads: bytes, and seconds until it knows where they are."""
    started = time.perf_counter()
    saved = SavedState(folder)
    opening, read = time.perf_counter() - started, 0
    for name, shape in saved.shapes.items():
        part = -(-shape.numel() // NEW_RANKS)
        begin, end = min(shape.numel(), part), min(shape.numel(), 2 * part)
        for moment in (None, "exp_avg", "exp_avg_sq"):
            read += saved.slice(name, begin, end, moment).clone().nbytes
    return read, opening


def _drop_pages(folder: Path) -> None:
    for path in folder.rglob("*.pt"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
