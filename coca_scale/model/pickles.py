"""Pickles of tensors, torch's `.pt`: tensors and plain data are read, and nothing in them runs."""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import threading
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from coca_scale.errors import UserError

_FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch.load obeys it, whatever its caller says
_FORBIDDEN = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # it refuses to load where both are set
_LOCK = threading.RLock()  # the environment and torch's list of classes belong to the process
_NAMED = re.compile(r"GLOBAL (\S+)")
_ZIP = b"PK\x03\x04"
_OLD_PICKLES = 5  # of the format without a zip: mark, version, machine, content, names of storages
_LONGEST_NAME = 1000


class Unread:
    """Stands for an object that nobody needs, of a class that is neither imported nor called."""

    def __init__(self, *_: object) -> None:
        """Whatever it was made of is dropped."""

    def __new__(cls, *_: object) -> Unread:
        """As above, by another way that pickles have."""
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        """Whatever it held is dropped."""


@contextmanager
def tensors_alone(allowed: Collection[Any] = ()) -> Iterator[None]:
    """`torch.load` in this block reads tensors, plain data and `allowed`, whoever calls it and how.

    One thread at a time; processes started inside inherit the restriction, not what is allowed.

    Args:
        allowed: classes that do no harm whatever they are made of, or pairs of a class and the name
            that it stands for.
    """
    with _LOCK:
        before = {name: os.environ.pop(name, None) for name in (_FORCED, _FORBIDDEN)}
        os.environ[_FORCED] = "1"
        try:
            with torch.serialization.safe_globals(list(allowed)):
                yield
        finally:
            del os.environ[_FORCED]
            os.environ.update({name: value for name, value in before.items() if value is not None})


def read_pickle(
    path: Path,
    allowed: Collection[type] = (),
    unread: Collection[str] = (),
    place: str | torch.device | Callable[..., Any] = "cpu",
    mapped: bool = False,
) -> Any:
    """What is in a file that `torch.save` wrote.

    Args:
        path: of the file.
        allowed: classes that do no harm whatever they are made of.
        unread: packages whose objects become `Unread`.
        place: where tensors go.
        mapped: leave tensors on the disk until they are used, where the format allows.

    Raises:
        UserError: damaged, or holding more than tensors and plain data.
    """
    try:
        is_zip = _is_zip(path)  # the format before torch 1.6 is not
        _require_short_names(path, is_zip)
        stand_ins = _stand_ins(path, unread) if is_zip and unread else []
        with tensors_alone([*allowed, *stand_ins]):
            content = torch.load(
                path, map_location=place, weights_only=True, mmap=mapped and is_zip
            )
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(refusal(path, error)) from error
    except Exception as error:  # reading rubbish, an unpickler raises anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: damaged or cut short ({reason}); fetch it again") from error
    for value in inside(content):
        if isinstance(value, Tensor):
            _require_plain(value, path)
    return content


def refusal(path: Path, error: pickle.UnpicklingError) -> str:
    """Why a file, or something in a folder, is not read."""
    named = _NAMED.search(str(error))
    what = named[1] if named else "more than tensors and plain data"
    return (
        f"{path}: holds {what}, and loading it could run code in it; save the tensors alone, as "
        ".safetensors, where you trust it"
    )


def inside(content: Any) -> Iterator[Any]:
    """All that is in nested containers: keys, values and members, each container once."""
    waiting, seen = [content], set[int]()
    while waiting:
        value = waiting.pop()
        yield value
        if isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            waiting += value
            waiting += value.values() if isinstance(value, dict) else ()


def _is_zip(path: Path) -> bool:
    """Whether it is a zip as torch writes it: nothing compressed, no byte used twice.

    Raises:
        UserError: it is a program.
        ValueError: it would unfold into more than it is.
        zipfile.BadZipFile: cut short.
    """
    with path.open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return False
    with zipfile.ZipFile(path) as opened:
        entries = opened.infolist()
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise UserError(f"{path}: a TorchScript program, not a file of weights")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("it would unfold into more than it is")
    return True


def _require_short_names(path: Path, is_zip: bool) -> None:
    """Refuse classes of endless names: torch searches its own message about one by its square.

    Raises:
        UserError: there is one.
        Exception: it is no pickle, anything of what `pickletools` raises.
    """
    for pickled in _pickles(path, is_zip):
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name in ("GLOBAL", "INST") and len(argument or "") > _LONGEST_NAME:
                raise UserError(f"{path}: holds an object of a class that nobody could name")


def _pickles(path: Path, is_zip: bool) -> Iterator[IO[bytes]]:
    """Every pickle in a file, open where it begins."""
    if is_zip:
        with zipfile.ZipFile(path) as opened:
            for entry in opened.namelist():
                if entry.endswith("/data.pkl"):
                    with opened.open(entry) as file:
                        yield file
        return
    with path.open("rb") as file:
        for _ in range(_OLD_PICKLES):
            yield file


def _stand_ins(path: Path, packages: Collection[str]) -> list[tuple[type, str]]:
    wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [(Unread, name) for name in wanted if name.partition(".")[0] in packages]


def _require_plain(tensor: Tensor, path: Path) -> None:
    """Refuse tensors of special kinds, and those that claim to be larger than their data."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.is_quantized or tensor.is_nested or tensor.device.type == "meta":
        raise UserError(f"{path}: holds a tensor that is quantized, sparse or without data")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        shape = " × ".join(str(size) for size in tensor.shape)
        raise UserError(f"{path}: holds a tensor of {shape} without as many numbers")
