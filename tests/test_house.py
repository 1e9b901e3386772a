"""The rules of the house: import directions, file sizes, helpers of tests."""

import ast
import subprocess
import sys
from collections.abc import Iterator
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


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def test_a_helper_of_two_tests_is_in_no_test_file():
    files = list(Path("tests").rglob("*.py"))
    wrong = {
        f"{path}: {name}"
        for path in files
        for name in imported(path)
        if any(part.startswith("test_") for part in name.split("."))
    }
    assert len(files) > 60
    assert not wrong
