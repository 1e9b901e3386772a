"""Commands of README and docs that the tests of the docs do not run, and why."""

from __future__ import annotations

import re

# what a command begins with → who runs it, or why nobody does
ELSEWHERE = {
    "make ": "CI runs demo and tests themselves",
    "docker ": "tests/docker builds the image with buildah, and runs doctor in it",
    "SHARDS=": "compose is not here; tests/docker compares its file with the image",
    "DATA=": "compose is not here; tests/docker compares its file with the image",
    "apptainer ": "apptainer is not here; tests/docker compares its file with the Dockerfile",
    "deepspeed --hostfile": "ssh between hosts is not here",
    "sbatch ": "tests/cluster submits the shipped scripts to a real SLURM",
    r"coca-scale publish (?!.*--dry-run)": "tests/reports/test_publish.py has a hub",
    "coca-scale slurm .* --submit": "tests/planning and tests/cluster",
    "bash docs/journey.sh": "tests/docs/test_package.py",
}


def elsewhere(command: str) -> str | None:
    """Why a command is not run here, None if it is."""
    return next((why for start, why in ELSEWHERE.items() if re.match(start, command)), None)
