"""Whether a node can take its ranks: `slurm/launch.sh` asks every one before each start.

python -m coca_scale.doctor.node RUN_FOLDER RANKS SECONDS

A line of stdout that begins with `node: ` says what the node computes with, or what is wrong with
it; the exit code is 0 or 1. It imports little, and torch only where there are GPUs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from coca_scale.errors import UserError, refusal
from coca_scale.recipe.process import PROC, Process, words_of
from coca_scale.recipe.text import tell

LOOK_SECONDS = 0.2
GRACE_SECONDS = 5.0  # for what an earlier start has left to end by itself
FREE_SHARE = 0.9  # of a GPU's memory that nobody else may use
LEAST_BYTES = 32 * 2**20  # less is full; a container's /dev/shm may have 64 MiB in all
SIZE = 512  # of a product


def main(folder: str, ranks: str, seconds: str) -> int:
    """Look at everything, within a limit; returns the exit code."""
    doing = ["the check begins"]

    def late() -> None:
        _say(f"no end after {seconds} s while {doing[0]}")
        os._exit(1)

    timer = threading.Timer(float(seconds), late)
    timer.daemon = True
    timer.start()
    deadline = time.monotonic() + float(seconds) / 2
    devices = ""
    steps: list[tuple[str, Callable[[], object]]] = [
        ("processes of an earlier start end", lambda: end_leftovers(deadline)),
        (f"a file is written into {folder}", lambda: look_at_folder(Path(folder))),
        ("temporary folders are looked at", look_at_room),
    ]
    try:
        for doing[0], step in steps:
            step()
        doing[0] = "a product is computed"
        devices = compute(int(ranks), deadline)
    except UserError as error:
        _say(str(error))
        return 1
    _say(devices)
    return 0


def end_leftovers(deadline: float) -> None:
    """Wait for what this node still runs of an earlier start of the job, and kill it at last.

    Raises:
        UserError: a process does not even end then.
    """
    kill_at = time.monotonic() + GRACE_SECONDS
    while left := [process for process in _of_this_job() if process.alive]:
        now = time.monotonic()
        if now > max(deadline, kill_at):
            raise UserError(
                f"process {left[0].pid} of an earlier start does not end when it is killed, as "
                "where a GPU or a file system hangs"
            )
        if now > kill_at:
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        time.sleep(LOOK_SECONDS)


def _of_this_job() -> list[Process]:
    """Ranks of this job on this node, and what they have started: nobody else has the variable."""
    here = {f"{name}={os.environ.get(name)}" for name in ("SLURM_JOB_ID", "SLURMD_NODENAME")}
    found = []
    for entry in PROC.iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            words = words_of(int(entry.name), "environ")
            ranks = any(word.startswith("COCA_SCALE_LAUNCH=") for word in words)
            if ranks and here <= set(words) and (process := Process.at(int(entry.name))):
                found.append(process)
    return found


def look_at_folder(folder: Path) -> None:
    """See that this node reads what it writes into the run folder.

    Raises:
        UserError: it does not.
    """
    probe = folder / f".node-{os.environ.get('SLURMD_NODENAME', '')}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("here")
        content = probe.read_text()
        probe.unlink()
    except OSError as error:
        raise UserError(f"the run folder cannot be used: {refusal(error)}") from error
    if content != "here":
        raise UserError(f"{folder.absolute()} does not give back what is written there")


def look_at_room() -> None:
    """See that shared memory and the temporary folder are not full.

    Raises:
        UserError: naming the one that is.
    """
    for folder in dict.fromkeys((Path("/dev/shm"), Path(tempfile.gettempdir()))):
        if folder.is_dir() and (free := shutil.disk_usage(folder).free) < LEAST_BYTES:
            raise UserError(f"{folder} is full: {free / 1e6:.0f} MB are free")


def compute(ranks: int, deadline: float) -> str:
    """Compute a product on every GPU of a rank, or on the CPU where there are none.

    Args:
        ranks: of this node, one GPU each.
        deadline: until when a GPU may still have memory in use by others.

    Returns:
        What the ranks will compute with; the same on all nodes that fit together.

    Raises:
        UserError: it is wrong, a GPU is missing, or its memory is in use.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not [*Path("/dev").glob("nvidia[0-9]*")]:
        return _compute_here()
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        return _compute_here()
    if count < ranks:
        raise UserError(f"{count} GPUs for {ranks} ranks")
    factor = (torch.arange(SIZE * SIZE) % 7).reshape(SIZE, SIZE).float()  # exact in TF32 as well
    expected = factor @ factor.T
    for index in range(ranks):
        try:
            device = torch.device("cuda", index)
            product = factor.to(device) @ factor.T.to(device)
            if not torch.equal(product.cpu(), expected):
                raise UserError(f"GPU {index} computes a wrong product")
            while (memory := torch.cuda.mem_get_info(index))[0] < FREE_SHARE * memory[1]:
                if time.monotonic() > deadline:
                    used, of = (memory[1] - memory[0]) / 1e9, memory[1] / 1e9
                    raise UserError(f"GPU {index}: others use {used:.0f} of its {of:.0f} GB")
                time.sleep(LOOK_SECONDS)
        except RuntimeError as error:
            raise UserError(f"GPU {index}: {str(error).splitlines()[0]}") from error
    return f"{ranks} × {torch.cuda.get_device_name(0)}"


def _compute_here() -> str:
    import numpy as np

    whole = (np.arange(SIZE * SIZE) % 7).reshape(SIZE, SIZE)
    factor = whole.astype(np.float32)
    if not np.array_equal(factor @ factor.T, whole @ whole.T):
        raise UserError("the CPU computes a wrong product")
    return "CPU"


def _say(message: str) -> None:
    tell(f"node: {message}", sys.stdout)


if __name__ == "__main__":
    os._exit(main(*sys.argv[1:]))  # at once: libraries may hang on their way out
