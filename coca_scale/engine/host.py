"""Memory of the host: what there is, what is free, and giving back what is no longer needed.

Containers and jobs often may use less than the machine has: a kernel's control group says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

_CGROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
# names of the limit, of what is used, and of the cached files in it, which can go at any time
_VERSIONS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def memory_bytes() -> int:
    """All that this process and those beside it may use."""
    limits = [limit for limit, _ in _limits(_CGROUPS, _OWN)]
    return min([int(psutil.virtual_memory().total), *limits])


def available_bytes() -> int:
    """What of it is free now."""
    free = [max(0, limit - used) for limit, used in _limits(_CGROUPS, _OWN)]
    return min([int(psutil.virtual_memory().available), *free])


def peak_bytes() -> int:
    """The most that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def regrowth_bytes() -> int:
    """What it has had and given back, and may well want again."""
    return max(0, peak_bytes() - int(psutil.Process().memory_info().rss))


def free_memory() -> None:
    """Give back what nothing refers to any more, on the device and in its host."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    release_freed()


def release_freed() -> None:
    """Give the system back what was freed: the C library keeps pieces up to 32 MB for later.

    A model of fp32 weights that was taken apart leaves most of its size behind otherwise.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _limits(root: Path, own: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of the control groups around this process, in bytes."""
    for folder in _groups(root, own):
        for limit_name, used_name, cached in _VERSIONS:
            limit, used = _number(folder / limit_name), _number(folder / used_name)
            if limit is not None and used is not None:
                yield limit, used - _cached(folder / "memory.stat", cached)


def _groups(root: Path, own: Path) -> Iterator[Path]:
    """Folders of the memory controller, from this process's own group up to the root."""
    lines = own.read_text().splitlines() if own.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / controllers if controllers else root
        inside = mount / path.lstrip("/")
        # in a container the path may be the host's, and what is mounted the group itself
        for folder in (inside, *inside.parents):
            if folder.is_relative_to(mount) and folder.is_dir():
                yield folder


def _number(path: Path) -> int | None:
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None  # "max" is none


def _cached(stat: Path, name: str) -> int:
    lines = stat.read_text().splitlines() if stat.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


def room_for_copies(ranks_here: int, in_background: bool) -> int:
    """Bytes that a rank may copy for a save: what training does not come to want meanwhile.

    A tenth of the host stays free beside that. Without a background every save is written before
    training goes on, and nothing is copied.
    """
    if not in_background:
        return 0
    free = round(available_bytes() - memory_bytes() / 10) // ranks_here
    return max(0, free - regrowth_bytes())
