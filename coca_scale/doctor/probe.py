"""What `coca-scale doctor` starts in processes of their own, as each may crash or hang.

python -m coca_scale.doctor.probe versions [--memory] | all-reduce BACKEND RANK SIZE FILE

A line of stdout that begins with `{` is a JSON object with findings; the rest is libraries' talk.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

REDUCED_BYTES = 16 * 2**20


def say(**facts: Any) -> None:
    """Hand findings to the parent."""
    print(json.dumps(facts), flush=True)  # noqa: T201 (read by a program)


def versions(memory: bool) -> None:
    """What PyTorch and DeepSpeed find; free memory only if asked, as it makes a context per GPU."""
    say(torch=torch.__version__, cuda=torch.version.cuda, gpus=_gpus(memory))
    if torch.version.cuda is not None and dist.is_nccl_available():
        say(nccl=".".join(map(str, torch.cuda.nccl.version())))
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    say(deepspeed=deepspeed.__version__, accelerator=get_accelerator().device_name())


def _gpus(memory: bool) -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free = torch.cuda.mem_get_info(index)[0] if memory else None
        gpu = {"name": properties.name, "total_bytes": properties.total_memory, "free_bytes": free}
        found.append(gpu)
    return found


def all_reduce(backend: str, rank: int, size: int, meeting: str) -> None:
    """Sum over `size` processes that meet through a file, checked, and timed once more."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=size)
    values = torch.full((REDUCED_BYTES // 4,), float(rank + 1), device=device)
    dist.all_reduce(values)
    expected = size * (size + 1) / 2
    if not bool((values == expected).all()):
        raise RuntimeError(f"all-reduce gave {values[0].item()} instead of {expected}")
    start = time.monotonic()
    dist.all_reduce(values)
    values[0].item()  # waits for the GPU
    say(seconds=time.monotonic() - start)
    dist.destroy_process_group()


def main(what: str, *arguments: str) -> None:
    """Run the probe that is named."""
    if what == "versions":
        versions("--memory" in arguments)
    else:
        backend, rank, size, meeting = arguments
        all_reduce(backend, int(rank), int(size), meeting)


if __name__ == "__main__":
    main(*sys.argv[1:])
