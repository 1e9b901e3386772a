"""A model without memory, and its first weights one at a time, as its constructors make them.

What constructors do to tensors is written down while they work on tensors without data, and done
again for one tensor when it is wanted: a rank never has more of a model than it asked for. (The
idea is torchdistx's `deferred_init`.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_META = torch.device("meta")
BLOCK_ELEMENTS = 2**20  # drawn at a time, with a seed of its own: a part costs no more
_OVERWRITING = {"normal_", "uniform_", "zero_", "fill_"}
_ELEMENTWISE = _OVERWRITING | {"mul_", "add_", "sub_", "div_", "erfinv_", "clamp_"}


@dataclass(frozen=True)
class _Done:
    """An operation: what was called, with what, and the storages that it was called with."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    reads: frozenset[int]


class Record(TorchDispatchMode):
    """What was done to tensors without data while `deferred` was entered."""

    def __init__(self) -> None:
        super().__init__()
        self._done: list[_Done] = []
        self._writers: dict[int, list[int]] = {}
        self._buffers: dict[torch.dtype, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do it on tensors without data, and keep what it was."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        reads = frozenset(_storages((args, kwargs)))
        changed = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        made = frozenset(_storages(result)) - reads
        writes = made | frozenset(_storages(changed))
        if writes:
            for storage in writes:
                self._writers.setdefault(storage, []).append(len(self._done))
            self._done.append(_Done(func, args, kwargs, result, reads))
        return result

    def make(self, tensors: Iterable[Tensor], seed: int) -> list[Tensor]:
        """The values of tensors without data, on the host; what is drawn follows from the seed.

        Args:
            tensors: parameters or buffers of what was made inside `deferred`.
            seed: of torch's generator, which is left as it was.
        """
        wanted = list(tensors)
        made: dict[int, torch.UntypedStorage] = {}

        def real(value: Any) -> Any:
            if isinstance(value, Tensor):
                return _view(value, made[_storage(value)])
            return torch.device("cpu") if value == _META else value

        with _generator() as generator, torch.no_grad():
            generator.manual_seed(seed)
            for number in sorted(self._needed(wanted)):
                done = self._done[number]
                args, kwargs = tree_map(real, (done.args, done.kwargs))
                result = done.function(*args, **kwargs)
                pairs = zip(tree_leaves(done.result), tree_leaves(result), strict=True)
                for without, value in pairs:
                    if isinstance(value, Tensor):
                        made.setdefault(_storage(without), value.untyped_storage())
            return [real(tensor) for tensor in wanted]

    def fill(self, target: Tensor, tensor: Tensor, begin: int, name: str) -> None:
        """Write elements of a tensor without data; the same whatever part is asked for.

        Args:
            target: gets as many as it has room for, flat, of any type and on any device.
            tensor: a parameter or buffer of what was made inside `deferred`.
            begin: its first element that is wanted.
            name: that what is drawn follows from, and from no other tensor.
        """
        filling, end = self._filling(tensor), begin + len(target)
        if filling is None:
            target.copy_(self.make([tensor], _seed_of(name))[0].reshape(-1)[begin:end])
            return
        if tensor.dtype not in self._buffers:  # kept: the C library would not take all of it back
            self._buffers[tensor.dtype] = torch.empty(BLOCK_ELEMENTS, dtype=tensor.dtype)
        buffer = self._buffers[tensor.dtype]
        with _generator() as generator, torch.no_grad():
            for number in range(begin // BLOCK_ELEMENTS, -(-end // BLOCK_ELEMENTS)):
                generator.manual_seed(_seed_of(f"{name} {number}"))
                at = number * BLOCK_ELEMENTS
                block = buffer[: tensor.numel() - at]
                for done in filling:
                    done.function(block, *done.args[1:], **done.kwargs)
                first, last = max(begin, at), min(end, at + len(block))
                target[first - begin : last - begin] = block[first - at : last - at]

    def _filling(self, tensor: Tensor) -> list[_Done] | None:
        """What makes up each element of a tensor by itself; None where there is more to it."""
        storage, filling = _storage(tensor), list[_Done]()
        for number in self._writers[storage]:
            done = self._done[number]
            name = done.function._schema.name.removeprefix("aten::")
            if not done.reads:  # made anew
                if not name.startswith("empty"):
                    return None
                continue
            whole = done.args[0].numel() == tensor.numel() == _elements(done.args[0])
            if name not in _ELEMENTWISE or done.reads != {storage} or not whole:
                return None
            filling = [done] if name in _OVERWRITING else [*filling, done]
        return filling

    def _needed(self, tensors: Iterable[Tensor]) -> set[int]:
        """Numbers of the operations that make up tensors, with all that those depend on."""
        waiting, seen, needed = [_storage(t) for t in tensors], set[int](), set[int]()
        while waiting:
            storage = waiting.pop()
            if storage in seen:
                continue
            seen.add(storage)
            for number in self._writers.get(storage, ()):
                needed.add(number)
                waiting += self._done[number].reads
        return needed


@contextmanager
def deferred() -> Iterator[Record]:
    """Modules made in this block have no memory; the record makes what they would have held."""
    record = Record()
    with _META, record:
        yield record


class FirstWeights(Protocol):
    """What tensors without memory are to hold."""

    def fill(self, target: Tensor, name: str, tensor: Tensor, begin: int) -> None:
        """Write a flat tensor's elements from `begin` on, as many as the target has room for."""
        ...


@dataclass(frozen=True)
class Drawn:
    """Weights as their constructors draw them; each follows from its name and the seed alone."""

    record: Record
    seed: int

    def fill(self, target: Tensor, name: str, tensor: Tensor, begin: int) -> None:
        """As of `FirstWeights`."""
        self.record.fill(target, tensor, begin, f"{self.seed} {name}")


@dataclass(frozen=True)
class ToBeLoaded:
    """Parameters of zeros, for a checkpoint to fill; buffers as their constructors make them."""

    record: Record

    def fill(self, target: Tensor, name: str, tensor: Tensor, begin: int) -> None:
        """As of `FirstWeights`."""
        if isinstance(tensor, torch.nn.Parameter):
            target.zero_()
        else:
            self.record.fill(target, tensor, begin, name)


@torch.no_grad()
def fill_part(
    name: str, tensor: Tensor, first: FirstWeights | None, target: Tensor, begin: int = 0
) -> None:
    """Write a flat tensor's elements, or what they are to be if it has no memory, as `fill`."""
    if tensor.device.type != "meta":
        target.copy_(tensor.reshape(-1)[begin : begin + len(target)])
        return
    assert first is not None, f"nobody has values for {name}"
    first.fill(target, name, tensor, begin)


def whole_of(
    name: str,
    tensor: Tensor,
    first: FirstWeights | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """A tensor with its values, whole."""
    whole = torch.empty(tensor.shape, dtype=dtype, device=device)
    fill_part(name, tensor, first, whole.view(-1))
    return whole


@contextmanager
def _generator() -> Iterator[torch.Generator]:
    """That of the host that operations draw from, left as it was."""
    state = torch.default_generator.get_state()
    try:
        yield torch.default_generator
    finally:
        torch.default_generator.set_state(state)


def _seed_of(text: str) -> int:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _storages(value: Any) -> Iterator[int]:
    return (_storage(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _view(like: Tensor, storage: torch.UntypedStorage) -> Tensor:
    view = torch.empty(0, dtype=like.dtype)
    return view.set_(storage, like.storage_offset(), like.size(), like.stride())


def _elements(tensor: Tensor) -> int:
    """That the whole storage of a tensor has room for."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()
