"""An export evaluates unchanged in CLIP_benchmark, by its real command."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from webdataset import TarWriter

from coca_scale.data.synthetic import Shapes
from tests.invoke import output_of


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """30 drawings as CLIP_benchmark wants them, with one to three captions, a line each."""
    root = tmp_path_factory.mktemp("wds")
    (root / "test").mkdir()
    shapes = Shapes(30, 64, "val")
    with TarWriter(str(root / "test" / "0.tar")) as writer:
        for number in range(30):
            sample, buffer = shapes[number], io.BytesIO()
            sample.image.save(buffer, "PNG")
            words = f"{sample.caption} {number}"
            lines = (words, f"{number} {sample.caption}", f"a drawing of {words}")
            text = "\n".join(lines[: 1 + number % 3])
            writer.write({"__key__": f"{number:04d}", "png": buffer.getvalue(), "txt": text})
    (root / "test" / "nshards.txt").write_text("1")
    (root / "dataset_type.txt").write_text("retrieval")
    return root


def theirs(export, root, out):
    """What CLIP_benchmark's command finds."""
    command = [str(Path(sys.executable).with_name("clip_benchmark")), "eval"]
    command += ["--model", f"local-dir:{export}", "--pretrained", "", "--dataset", "wds/drawings"]
    command += [
        "--dataset_root",
        str(root),
        "--task",
        "zeroshot_retrieval",
        "--recall_k",
        "1",
        "5",
        "10",
    ]
    command += ["--no_amp", "--num_workers", "0", "--output", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())["metrics"]


@pytest.mark.slow
def test_retrieval(trained, shards, tmp_path):
    found = theirs(trained.folder, shards, tmp_path / "t.json")
    out = tmp_path / "o.json"
    output_of("eval", "retrieval", trained.folder, shards / "test", "--out", out)
    mine = json.loads(out.read_text())["scores"]
    for k in (1, 5, 10):
        assert mine[f"image_to_text_r{k}"] == pytest.approx(found[f"text_retrieval_recall@{k}"])
        assert mine[f"text_to_image_r{k}"] == pytest.approx(found[f"image_retrieval_recall@{k}"])
