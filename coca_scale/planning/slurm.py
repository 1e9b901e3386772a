"""Job scripts for SLURM: the one way in which those of `slurm/` are made."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from coca_scale.errors import UserError
from coca_scale.planning.nodes import split_over
from coca_scale.recipe import load_recipe
from coca_scale.recipe.text import shell_word
from coca_scale.recipe.whole_files import write_whole

DEFAULT_TIME = "24:00:00"
SAVE_SECONDS = 300  # before the time limit; a checkpoint must be written within
CORES_BESIDE_WORKERS = 4  # the rank itself, its copies to the GPU, its communication
LAUNCH_FILE = Path("slurm") / "launch.sh"
_TIME = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}", re.ASCII)
_NAME_LENGTH = 100  # of a job; it is part of file names

_SCRIPT = """\
#!/usr/bin/env bash
# {recipe} on {gpus} GPUs: {nodes} node{s} × {tasks} tasks, one task per GPU{spare}.
#   sbatch [--account=... --partition=...] THIS_FILE [key.path=value ...]
# Settings of the cluster: slurm/site.example.sh. Written by
#   {command}
#SBATCH --job-name={name}
#SBATCH --nodes={allocated}
#SBATCH --ntasks-per-node={tasks}
#SBATCH --cpus-per-task={cores}
#SBATCH --gres=gpu:{tasks}
{memory}#SBATCH --time={time}
#SBATCH --signal=USR1@{save_seconds}
#SBATCH --requeue
{keep}#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

{spares}# shellcheck source=/dev/null
. "${{COCA_SCALE_HOME:-${{SLURM_SUBMIT_DIR:?is not set: submit this script with sbatch}}}}/{launch}"

recipe={recipe}
launch_training "${{RECIPE:-$recipe}}" {overrides}"$@"
"""

_SUBMIT = """\
site=${SITE:-slurm/site.sh}
case $site in */*) ;; *) site=./$site ;; esac  # or bash looks for it in PATH
[ ! -f "$site" ] || . "$site"
sbatch --parsable "$0"
"""


def render(
    recipe: Path,
    overrides: Sequence[str] = (),
    *,
    gpus: int,
    gpus_per_node: int = 8,
    spares: int = 0,
    time: str = DEFAULT_TIME,
) -> str:
    """The sbatch script that trains a recipe.

    Args:
        recipe: YAML file; inside the checkout it is named relative to it, as the job runs there.
        overrides: `key.path=value`, written into the script.
        gpus: ranks of the job.
        gpus_per_node: of the cluster; a job of several nodes takes whole ones.
        spares: nodes more than the ranks need, for those that fail.
        time: limit in a form of sbatch: minutes, HH:MM:SS, D-HH:MM:SS.

    Raises:
        UserError: the recipe is wrong, its batch does not divide over the ranks, the ranks do not
            fill whole nodes, or the time is not one.
    """
    loaded = load_recipe(recipe, overrides)
    split_over(loaded, gpus)
    nodes = -(-gpus // gpus_per_node)
    if nodes > 1 and gpus % gpus_per_node:
        raise UserError(
            f"{gpus} GPUs do not fill whole nodes of {gpus_per_node}; use a multiple of "
            f"{gpus_per_node}, or --gpus-per-node"
        )
    if not _TIME.fullmatch(time):
        raise UserError(f"time {time!r}: write it as minutes, HH:MM:SS or D-HH:MM:SS")
    tasks = gpus // nodes
    if spares and tasks < gpus_per_node:
        raise UserError(
            f"a job of {gpus} GPUs has a part of a node of {gpus_per_node}; spares are whole nodes"
        )
    where = shell_word(_from_checkout(recipe))
    options = {"--gpus": gpus}
    if gpus_per_node != 8:
        options["--gpus-per-node"] = gpus_per_node
    words = [f"{name} {value}" for name, value in options.items()]
    words += [f"--spares {spares}"] if spares else []
    words += [f"--time {time}"] if time != DEFAULT_TIME else []
    quoted = [shell_word(override) for override in overrides]
    return _SCRIPT.format(
        recipe=where,
        gpus=gpus,
        nodes=nodes,
        s="" if nodes == 1 else "s",
        spare=f", and {spares} spare node{'s' * (spares > 1)}" if spares else "",
        allocated=nodes + spares,
        # or SLURM ends a job that loses a node, though it could go on without
        keep="#SBATCH --no-kill\n" if nodes + spares > 1 else "",
        spares=f"SPARE_NODES=${{SPARE_NODES:-{spares}}}\n" if spares else "",
        tasks=tasks,
        command=" ".join(["coca-scale slurm", where, *words, *quoted]),
        name=re.sub(r"[^\w.-]", "_", loaded.run.name)[:_NAME_LENGTH],
        cores=loaded.data.workers + CORES_BESIDE_WORKERS,
        # whole nodes with all their memory; a part of a node gets what the site gives a core
        memory="#SBATCH --mem=0\n" if tasks == gpus_per_node else "",
        time=time,
        save_seconds=SAVE_SECONDS,
        launch=LAUNCH_FILE.as_posix(),
        overrides="".join(f"{override} " for override in quoted),
    )


def submit(script: str, file: Path | None) -> str:
    """Send a script to SLURM, from the checkout and with the site file's settings.

    Args:
        script: as `render` gives it.
        file: where it has been written, None if nowhere.

    Returns:
        The job id.

    Raises:
        UserError: there is no sbatch, no checkout, or sbatch refused the job.
    """
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here; write the script with --out and submit it there")
    home = checkout()
    if not (home / LAUNCH_FILE).is_file():
        raise UserError(
            f"{home / LAUNCH_FILE} is missing, which every job needs; "
            "set COCA_SCALE_HOME to a checkout of coca-scale"
        )
    with tempfile.TemporaryDirectory() as folder:
        if file is None:
            file = Path(folder) / "job.sh"
            write(script, file)
        done = subprocess.run(
            ["bash", "-c", _SUBMIT, str(file.absolute())],
            cwd=home,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise UserError(f"sbatch refused the job: {' '.join(done.stderr.split())}")
    said = done.stdout.split()
    if not said:
        raise UserError("sbatch gave no job number; look with squeue whether it took the job")
    return said[-1].partition(";")[0]


def write(script: str, file: Path) -> None:
    """A script as a file; in UTF-8, whatever the locale."""
    write_whole(file, script)


def checkout() -> Path:
    """The folder with `slurm/` and `recipes/`: COCA_SCALE_HOME, or where this package lies."""
    return Path(os.environ.get("COCA_SCALE_HOME") or Path(__file__).parents[2]).resolve()


def _from_checkout(recipe: Path) -> str:
    path, home = recipe.resolve(), checkout()
    name = str(path.relative_to(home)) if path.is_relative_to(home) else str(path)
    return f"./{name}" if name.startswith("-") else name
