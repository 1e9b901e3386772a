"""What a computation keeps, needs and takes: bytes of live tensors, FLOPs, seconds."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations inside make, and that are still alive.

    Unlike hooks on saved tensors it sees whatever is kept by whatever means, and nothing twice.
    `part` names what new storages are counted under. `peak` is looked at after every
    `look_every`-th operation, as looking takes longer than a small operation.
    """

    def __init__(self, look_every: int = 1) -> None:
        super().__init__()
        self.part = "rest"
        self._look_every, self._operations = look_every, 0
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self._known: set[int] = set()

    def ignore(self, tensors: list[Tensor]) -> None:
        """Tensors that were there before."""
        self._known |= {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and note what it made."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self._known and key not in self._alive:
                    self._alive[key] = (StorageWeakRef(storage), storage.nbytes(), self.part)
        self._operations += 1
        if self._operations % self._look_every == 0:
            self.peak = max(self.peak, sum(self.by_part().values()))
        return out

    def by_part(self) -> dict[str, int]:
        """Bytes alive now."""
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        found: dict[str, int] = defaultdict(int)
        for _, size, part in self._alive.values():
            found[part] += size
        return dict(found)


@contextmanager
def parts(mode: LiveBytes, modules: Mapping[str, nn.Module | None]) -> Iterator[None]:
    """Count under the name of the module that runs."""
    handles = []
    for name, module in modules.items():
        if module is None:
            continue

        def enter(_module: nn.Module, _args: Any, name: str = name) -> None:
            mode.part = name

        def leave(_module: nn.Module, _args: Any, _out: Any) -> None:
            mode.part = "rest"

        handles += [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def flops(step: Callable[[], object]) -> int:
    """Multiplications and additions of all matrix products and attentions inside."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def medians(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, measured in turns, so that a noisy machine hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            _synchronize()
            started = time.perf_counter()
            step()
            _synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
