"""The rules of the house: import directions, file sizes."""

import subprocess
import sys
from pathlib import Path


def test_imports_go_downwards_only():
    done = subprocess.run(["lint-imports"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_files_stay_readable():
    files = [
        p for folder in ("coca_scale", "tests", "benchmarks") for p in Path(folder).rglob("*.py")
    ]
    long = {str(p): n for p in files if (n := len(p.read_text().splitlines())) > 500}
    assert len(files) > 40
    assert not long


def test_slow_libraries_are_imported_only_where_they_are_used():
    """Every rank, loader and command would pay for them: 11 s instead of 4 s until it starts."""
    code = (
        "import sys, coca_scale.training.trainer, coca_scale.reports.page, coca_scale.cli, "
        "coca_scale.evaluation.kinds, coca_scale.evaluation.caption_job\n"
        "print(*({'open_clip', 'torchvision', 'timm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
