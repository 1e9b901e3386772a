"""A checkout in which the commands of the docs run at tiny scale, from the built wheel.

Recipes are shrunk to coca_tiny and three steps, data sets and models that the docs name are there
as small ones, and what a command says of sizes and machines (`--gpus 64`) is rewritten by `RULES`.
Everything else is what the page says.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from webdataset import TarWriter

from coca_scale.data.synthetic import Shapes
from tests.docs.blocks import ROOT

SIZE = 48
PICTURES = 24
STEPS = 4
# what a page says → what is run here
RULES = (
    (r"(?<![\w./])/data/", "data/"),
    (r"\{(0+)\.\.\d+\}", r"{\1..\1}"),
    (r"--gpus \d+", "--gpus 2"),
    (r"--nproc[-_]per[-_]node[= ]\d+", "--nproc-per-node 2"),
    (r"--num_gpus \d+", "--num_gpus 2"),
    (r"--nnodes=2", "--nnodes=1"),
    (r"--rdzv_endpoint=\S+", "--rdzv_endpoint=localhost:0"),
    (r"mpirun -n \d+( -H \S+)?", "mpirun --allow-run-as-root --oversubscribe -n 2"),
    (r"\.venv/bin/python", "python"),
    (r"\btrain\.(steps|epochs)=\d+", f"train.steps={STEPS}"),
    (r"\bstages\.(\d)\.steps=\d+", r"stages.\1.steps=1"),
    (r"\btrain\.micro_batch=\d+", "train.micro_batch=4"),
    (r"\beval\.scored_captions=\d+", "eval.scored_captions=4"),
    (r"coca_ViT-L-14@\w[\w-]*", "runs/published"),
    (r"--max-length \d+", "--max-length 12"),
    (r"step_\d{8}", f"step_{STEPS:08d}"),
    (r"^(coca-scale demo|tensorboard) (.*)$", r"served \1 \2"),
    (r"^tail -f .*$", "true"),
)
SERVED = """#!/bin/sh
# a server: right if it is still there after a while, and ends when it is told to
timeout --signal=INT 25 "$@"
[ $? = 124 ]
"""


def tiny_text(text: str) -> str:
    """A block as it is run here."""
    for pattern, replacement in RULES:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text


def shrink(recipe: dict[str, Any]) -> dict[str, Any]:
    """A shipped recipe with the tiny model and a few samples."""
    decoder = recipe["model"]["name"].startswith("coca")
    model = {"name": "coca_tiny" if decoder else "clip_tiny"}
    if recipe["model"].get("pretrained"):
        model["pretrained"] = "runs/published"
    data = {**recipe["data"], "workers": 0, "shuffle_window": 16, "train_samples": 64}
    data.pop("lanes", None)
    for part in ("train", "val"):
        if data.get(part):
            data[part] = tiny_text(data[part]).replace("count=100000", "count=256")
    batch = {"steps": STEPS, "global_batch": 8, "micro_batch": 4}
    engine = {**recipe["engine"], "precision": "fp32"}
    engine.pop("activation_budget_gb", None)
    schedule = {**recipe["schedule"], "warmup_steps": 1}
    if schedule.get("stages"):
        schedule["stages"] = [{"steps": STEPS - 1, "image_size": 24}, {"steps": 1}]
        del batch["steps"]
    return {
        **recipe,
        "model": model,
        "data": data,
        "train": batch,
        "engine": engine,
        "schedule": schedule,
        "checkpoint": {**recipe["checkpoint"], "every_steps": 2},
        "eval": {"every_steps": None, "samples": 8, "captions": 2},
        "log": {"every_steps": 1},
    }


def write_checkout(folder: Path) -> None:
    """What the commands need of the repository; the package itself is the installed one."""
    for name in ("slurm", "docs", "docker"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "coca_scale").mkdir()
    shutil.copy(ROOT / "coca_scale" / "train.py", folder / "coca_scale")
    (folder / "recipes").mkdir()
    for path in (ROOT / "recipes").glob("*.yaml"):
        small = shrink(yaml.safe_load(path.read_text()))
        (folder / "recipes" / path.name).write_text(yaml.safe_dump(small, sort_keys=False))
    shutil.copy(folder / "recipes" / "small.yaml", folder / "my_recipe.yaml")
    (folder / "bin").mkdir()
    (folder / "bin" / "served").write_text(SERVED)
    (folder / "bin" / "served").chmod(0o755)
    (folder / "hosts").write_text("localhost slots=2\n")


def write_data(folder: Path) -> None:
    """Every data set that the docs name, with drawings in it."""
    shapes = Shapes(PICTURES, SIZE, "val")
    samples = [shapes[number] for number in range(PICTURES)]
    photos = folder / "photos"
    photos.mkdir()
    rows = []
    for number, sample in enumerate(samples):
        sample.image.save(photos / f"{number:03d}.jpg")
        (photos / f"{number:03d}.txt").write_text(sample.caption)
        rows.append((f"photos/{number:03d}.jpg", sample.caption))
    shutil.copy(photos / "000.jpg", folder / "photo.jpg")
    for name in ("train.csv", "held_out.csv", "train.tsv", "val.tsv"):
        _write_table(folder / name, rows)
    _write_coco(folder, rows)
    for name in ("data/cc12m", "data/cc3m", "data/coco/train", "data/coco/val", "shards/train"):
        _write_shard(folder / name / "00000.tar", samples)
    for name in ("data/laion2b/000000.tar", "shards/val/000000.tar", "shards/000000.tar"):
        _write_shard(folder / name, samples)
    for sample in samples[:8]:
        kind = folder / "imagenet" / "val" / sample.caption.split()[-1]
        kind.mkdir(parents=True, exist_ok=True)
        sample.image.save(kind / f"{sample.key.replace('/', '_')}.png")
    shutil.copytree(photos, folder / "stamps" / "usr" / "share" / "tuxpaint" / "stamps")
    wds = folder / "coco_wds"
    for number in range(4):  # as many as CLIP_benchmark starts loaders
        _write_shard(wds / "test" / f"{number}.tar", samples[number::4])
    (wds / "test" / "nshards.txt").write_text("4")
    (wds / "dataset_type.txt").write_text("retrieval")


def _write_table(path: Path, rows: list[tuple[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerows([("filepath", "title"), *rows])


def _write_coco(folder: Path, rows: list[tuple[str, str]]) -> None:
    """Annotations of COCO, Karpathy's splits, and OpenCLIP's table with tabs."""
    for year in ("train2014", "val2014", "coco"):
        shutil.copytree(folder / "photos", folder / year)
    images = [{"id": n, "file_name": Path(path).name} for n, (path, _) in enumerate(rows)]
    captions = [{"image_id": n, "caption": text} for n, (_, text) in enumerate(rows)]
    captions += [{"image_id": n, "caption": f"this is {text}"} for n, (_, text) in enumerate(rows)]
    (folder / "annotations").mkdir()
    for year in ("train2014", "val2014"):
        path = folder / "annotations" / f"captions_{year}.json"
        path.write_text(json.dumps({"images": images, "annotations": captions}))
    karpathy = [
        {"filename": Path(path).name, "split": "test", "sentences": [{"raw": text}]}
        for path, text in rows
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": karpathy}))
    lines = "".join(f"{Path(path).name}\t{text}\n" for path, text in rows)
    (folder / "coco" / "train2014.csv").write_text(f"filepath\ttitle\n{lines}")


def _write_shard(path: Path, samples: list[Any]) -> None:
    path = path if path.suffix == ".tar" else path / "00000.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path)) as writer:
        for number, sample in enumerate(samples):
            captions = {"captions": [sample.caption, f"this is {sample.caption}"]}
            name = {"__key__": f"{number:05d}"}
            writer.write({**name, "jpg": sample.image, "txt": sample.caption, "json": captions})


def environment(installed: Path, folder: Path) -> dict[str, str]:
    """Of a shell in which the wheel is installed; tools for developers are found behind it."""
    path = (
        f"{folder / 'bin'}:{installed / 'bin'}:{os.environ['PATH']}:{Path(sys.executable).parent}"
    )
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {
        **kept,
        "PATH": path,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "80",
    }


def shell(script: str, folder: Path, installed: Path) -> subprocess.CompletedProcess[str]:
    """Run a script in a checkout; output and errors together."""
    return subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", script],
        cwd=folder,
        env=environment(installed, folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
