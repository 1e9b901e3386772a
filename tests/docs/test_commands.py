"""Every command of README and docs does something, at tiny scale, with the built wheel."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.docs.blocks import PAGES, ROOT, Block, blocks, commands
from tests.docs.elsewhere import elsewhere
from tests.docs.sandbox import shell, tiny_text

MODEL_RUN = re.compile(r"\bruns/(\w+)")


def script_of(block: Block) -> str:
    """What of a shell block is run here."""
    return "\n".join(c for c in commands(block.text) if elsewhere(c) is None)


def prepare(folder: Path, page: Path) -> None:
    """Runs that a page takes for granted are there, and what it writes itself is not."""
    text = "\n".join(tiny_text(b.text) for b in blocks(page))
    made = {f"runs/{name}" for name in re.findall(r"run\.dir=runs/(\w+)", text)}
    for name in re.findall(r"train\.py --recipe recipes/(\w+)\.yaml", text):
        recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
        made.add(f"runs/{recipe['run']['name']}")
    for name in set(MODEL_RUN.findall(text)) - {"published"}:
        if f"runs/{name}" not in made:
            shutil.copytree(folder / "runs" / "published", folder / "runs" / name)
    for out in re.findall(r"data pack .*--out (\S+)", text):
        shutil.rmtree(folder / out, ignore_errors=True)


@pytest.mark.docs
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_commands_of_a_page(page, copied, installed):
    scripts = "\n".join(script_of(b) for b in blocks(page) if b.language == "bash")
    if "mpirun" in scripts and shutil.which("mpirun") is None:
        pytest.skip("needs mpirun: apt-get install openmpi-bin")
    prepare(copied, page)
    ran = 0
    for block in blocks(page):
        if block.language == "bash" and (script := script_of(block)):
            done = shell(tiny_text(script), copied, installed)
        elif block.language == "python":
            (copied / "snippet.py").write_text(tiny_text(block.text))
            done = shell("python snippet.py", copied, installed)
        else:
            continue
        assert done.returncode == 0, f"{block.name}\n{done.stdout[-6000:]}"
        assert "Traceback" not in done.stdout, f"{block.name}\n{done.stdout[-6000:]}"
        ran += 1
    if not ran:
        pytest.skip("no commands that are run here")
