"""What a computation keeps and needs: bytes of live tensors, FLOPs."""

from __future__ import annotations

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
    `part` names what new storages are counted under. `peak` is exact to 1 %: looking
    takes longer than a small operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = "rest"
        self._new_bytes = 0
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
                key = storage._cdata  # tensors without data have no pointer
                if key not in self._known and key not in self._alive:
                    self._alive[key] = (StorageWeakRef(storage), storage.nbytes(), self.part)
                    self._new_bytes += storage.nbytes()
        if self._new_bytes > self.peak / 100:
            self._new_bytes = 0
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


def caption_quantiles(captions: int, mean_tokens: float, context: int, pad_id: int) -> Tensor:
    """Token ids [captions, context] whose lengths are evenly spaced quantiles of a distribution.

    A start and an end token, and between them a Poisson number of words.
    """
    generator = torch.Generator().manual_seed(0)
    words = torch.poisson(torch.full((8192,), max(mean_tokens - 2, 0.0)), generator).sort().values
    quantiles = ((torch.arange(captions) + 0.5) / captions * len(words)).long()
    lengths = (words[quantiles].long() + 2).clamp(max=context)
    inside = torch.arange(context) < lengths[:, None]
    return torch.where(inside, pad_id + 1, pad_id)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New parameters have it; those without data cannot be cast in place."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
