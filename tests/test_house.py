"""The rules of the house: import directions, file sizes."""

import subprocess
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
