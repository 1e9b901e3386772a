"""The sharded state of a checkpoint, read by slices: every rank takes what it needs, of any file.

So a run goes on over any number of ranks and at any ZeRO stage from 1 to 3 without a copy of the
checkpoint in another layout, all ranks at once. The layouts are DeepSpeed's, read against 0.19:

- stage 3 cuts each parameter into parts of the same size, one for every rank, the last ones padded;
  the parts of a rank lie behind each other, group by group;
- stages 1 and 2 lay the parameters of a group behind each other, and cut that into equal parts.

Files are mapped into memory, and nothing in them runs (`model/pickles.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    FP32_FLAT_GROUPS,
    OPTIMIZER_STATE_DICT,
    PARAM_SHAPES,
    SINGLE_PARTITION_OF_FP32_GROUPS,
)
from torch import Tensor

from coca_scale.engine.zero_files import HARMLESS, STATE_TAG, not_a_state
from coca_scale.errors import UserError
from coca_scale.model.pickles import read_pickle

_SHARD = re.compile(r"(?:.*_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_MODEL_STATES = ("zero_pp_rank_0_mp_rank_00_model_states.pt", "mp_rank_00_model_states.pt")


@dataclass(frozen=True)
class _Shard:
    """What one rank saved.

    Attributes:
        masters: fp32 weights, flat, of every group.
        moments: of the optimizer, by name, of every group; none of an average of weights.
        by_parameter: whether each parameter is cut, as at stage 3, and not the group.
        beside: whatever else is in the file.
    """

    masters: list[Tensor]
    moments: list[dict[str, Tensor]]
    by_parameter: bool
    beside: dict[str, Any]


@dataclass(frozen=True)
class _Place:
    """Where a parameter is.

    Every rank has `part` elements of it, from `offset` on in its flat group; or, of a group that is
    cut as a whole, `part` elements, and `offset` counts from the beginning of the group.
    """

    group: int
    shape: torch.Size
    offset: int
    part: int
    by_parameter: bool

    def segments(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Rank, first element in its flat group and number of elements, for a slice."""
        shift = 0 if self.by_parameter else self.offset
        at, end = shift + begin, shift + end
        while at < end:
            rank, inside = divmod(at, self.part)
            count = min(self.part - inside, end - at)
            yield rank, (self.offset if self.by_parameter else 0) + inside, count
            at += count


class SavedState:
    """Weights that train and their moments, as a run of any layout from stage 1 on saved them."""

    def __init__(self, folder: Path) -> None:
        """Of a checkpoint, or of the average of weights in it.

        Raises:
            UserError: files are missing, damaged, or hold something else.
        """
        self._folder = folder / STATE_TAG
        found = {int(m[1]): p for p in self._folder.glob("*.pt") if (m := _SHARD.fullmatch(p.name))}
        if not found or max(found) + 1 != len(found):
            raise UserError(f"{self._folder}: shards of {len(found)} ranks, and not of all")
        self._paths = found
        self._shards: dict[int, _Shard] = {}
        self._places = self._find_places()

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of all parameters, whole, by name."""
        return {name: place.shape for name, place in self._places.items()}

    @property
    def beside(self) -> dict[str, Any]:
        """What rank 0 wrote beside its state."""
        return self._shard(0).beside

    def masters(self, rank: int) -> list[Tensor]:
        """A rank's own flat weights, of every group.

        Raises:
            UserError: its file is missing, damaged, or holds something else.
        """
        if rank not in self._paths:
            raise UserError(f"{self._folder}: no shard of rank {rank}")
        return self._shard(rank).masters

    def slice(self, name: str, begin: int, end: int, moment: str | None = None) -> Tensor:
        """Elements of a flat parameter, fp32 [end - begin], or of one of its moments.

        Raises:
            UserError: a file is damaged, or does not have that moment.
        """
        place = self._place(name)
        pieces = []
        for rank, start, count in place.segments(begin, end):
            flat = self._flat(rank, place.group, moment)
            pieces.append(flat[start : start + count])
        found = pieces[0] if len(pieces) == 1 else torch.cat([*pieces, torch.empty(0)])
        if len(found) != end - begin:
            raise UserError(f"{self._folder}: a shard is shorter than {name} in it")
        return found

    def whole(self, name: str, moment: str | None = None) -> Tensor:
        """A parameter, or one of its moments, in its shape.

        Raises:
            UserError: as `slice`.
        """
        shape = self._place(name).shape
        return self.slice(name, 0, shape.numel(), moment).view(shape)

    def _place(self, name: str) -> _Place:
        if name not in self._places:
            raise UserError(f"{self._folder}: it holds no {name}")
        return self._places[name]

    def _flat(self, rank: int, group: int, moment: str | None) -> Tensor:
        if rank not in self._paths:
            raise UserError(f"{self._folder}: parameters are larger than the shards of all ranks")
        shard = self._shard(rank)
        if moment is None:
            return shard.masters[group]
        if group >= len(shard.moments) or moment not in shard.moments[group]:
            raise UserError(f"{self._paths[rank]}: it holds no {moment} of the optimizer")
        return shard.moments[group][moment]

    def _shard(self, rank: int) -> _Shard:
        if rank not in self._shards:
            path = self._paths[rank]
            content = read_pickle(path, HARMLESS, mapped=True)
            self._shards[rank] = _parsed(path, content)
        return self._shards[rank]

    def _find_places(self) -> dict[str, _Place]:
        first, ranks, places = self._shard(0), len(self._paths), dict[str, _Place]()
        groups = self._group_shapes()
        if len(groups) != len(first.masters):
            raise UserError(f"{self._folder}: {len(groups)} groups, shards of {len(first.masters)}")
        for number, shapes in enumerate(groups):
            offset = 0
            for name, shape in shapes.items():
                size = shape.numel()
                part = -(-size // ranks) if first.by_parameter else len(first.masters[number])
                places[name] = _Place(number, shape, offset, max(1, part), first.by_parameter)
                offset += part if first.by_parameter else size
        return places

    def _group_shapes(self) -> list[dict[str, torch.Size]]:
        for name in _MODEL_STATES:
            path = self._folder / name
            if path.is_file():
                content = read_pickle(path, HARMLESS, mapped=True)
                return _shapes_in(path, content)
        raise UserError(f"{self._folder}: {_MODEL_STATES[0]} is missing")


def _parsed(path: Path, content: Any) -> _Shard:
    """What a shard's file holds.

    Raises:
        UserError: something else.
    """
    state = content.get(OPTIMIZER_STATE_DICT) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise not_a_state(path)
    by_parameter = FP32_FLAT_GROUPS in state
    masters = state.get(FP32_FLAT_GROUPS if by_parameter else SINGLE_PARTITION_OF_FP32_GROUPS)
    if not isinstance(masters, list) or not all(_is_flat(master) for master in masters):
        raise not_a_state(path)
    kept = state.get(OPTIMIZER_STATE_DICT if by_parameter else BASE_OPTIMIZER_STATE, {})
    of_groups = kept.get("state", {}) if isinstance(kept, dict) else None
    if not isinstance(of_groups, dict):
        raise not_a_state(path)
    moments = [_flat_ones(of_groups.get(number, {})) for number in range(len(masters))]
    beside = {key: value for key, value in content.items() if key != OPTIMIZER_STATE_DICT}
    return _Shard(masters, moments, by_parameter, beside)


def _flat_ones(state: Any) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if _is_flat(v)} if isinstance(state, dict) else {}


def _is_flat(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1 and value.is_floating_point()


def _shapes_in(path: Path, content: Any) -> list[dict[str, torch.Size]]:
    groups = content.get(PARAM_SHAPES) if isinstance(content, dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise not_a_state(path)
    if not all(isinstance(shape, torch.Size) for group in groups for shape in group.values()):
        raise not_a_state(path)
    return groups
