"""Files of a checkpoint: copied at once, and written behind the steps that follow."""

from __future__ import annotations

import copy
import errno
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, Any

import torch
from torch.utils._pytree import tree_map

Entries = dict[str, dict[str, Any]]
MODEL_STATES = "model_states.pt"
PIECE_BYTES = 2**16  # smaller tensors are always copied


class FileWriter:
    """Tensors are copied to the host at once, a thread does the rest.

    So a save costs the run a copy of each rank's shard; the disk's time passes while it trains.
    Tensors for whose copy there is no room are not copied: then `start` writes everything before
    it returns, piece by piece, and the run waits for the disk.
    """

    def __init__(self, room_bytes: Callable[[], int]) -> None:
        """`room_bytes` says how much memory copies may take from now on."""
        self._room_bytes = room_bytes
        self._uncopied = False
        self._waiting: list[tuple[Path, Callable[[Any], Any]]] = []
        self._pool = ThreadPoolExecutor(2, "checkpoint")  # a slow disk holds up no other save

    def save(self, state: Any, path: Path) -> None:
        """Copy `state` now; `start` writes it. It must not change in between."""
        kept = tree_map(self._kept, state, is_leaf=_is_size)
        self.add(path, lambda file: torch.save(kept, file))

    def add(self, path: Path, write: Callable[[Any], Any]) -> None:
        """Let `write(file)` make one more file; it must not depend on what training changes."""
        self._waiting.append((path, write))

    def start(self, folder: Path, model_states_too: Path | None = None) -> Future[Entries]:
        """Write everything that was saved into `folder` and below it, in a thread if it can wait.

        Args:
            folder: of the checkpoint.
            model_states_too: folder in which DeepSpeed's model states get a second name.

        Returns:
            `bytes` and `sha256` of this rank's files, by name. An OSError in it is the disk's.
        """
        waiting, self._waiting = self._waiting, []
        at_once, self._uncopied = self._uncopied, False
        written = self._pool.submit(_write_all, waiting, folder, model_states_too)
        if at_once:
            wait([written])
        return written

    def _kept(self, leaf: Any) -> Any:
        """A copy, or the tensor itself."""
        if not isinstance(leaf, torch.Tensor):
            return copy.deepcopy(leaf)
        large = leaf.nbytes >= PIECE_BYTES and _fills_its_storage(leaf)
        if large and leaf.nbytes > self._room_bytes():
            self._uncopied = True
            return leaf.detach()
        return leaf.detach().to("cpu", copy=True)


def _is_size(node: Any) -> bool:
    return isinstance(node, torch.Size)  # pytree would make a plain tuple of it


def _fills_its_storage(tensor: torch.Tensor) -> bool:
    """Whether a file of the tensor would hold little else: torch writes whole storages."""
    return tensor.nbytes >= 0.9 * tensor.untyped_storage().nbytes()


def _write_all(
    waiting: list[tuple[Path, Callable[[Any], Any]]], folder: Path, second: Path | None
) -> Entries:
    written: Entries = {}
    while waiting:
        path, write = waiting.pop(0)  # memory goes back file by file
        require_folder(folder)
        entry = written[str(path.relative_to(folder))] = write_hashed(path, write)
        if second is not None and path.name.endswith(MODEL_STATES):
            other = second / path.name
            written[str(other.relative_to(folder))] = _link(path, other, entry)
    return written


def require_folder(folder: Path) -> None:
    """See that a folder is still there: one swept away by a job that took over is not to come back.

    Raises:
        FileNotFoundError: it is gone.
    """
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))


def write_hashed(path: Path, write: Callable[[Any], Any]) -> dict[str, Any]:
    """Let `write(file)` fill a file, and see it onto the disk; returns `bytes` and `sha256`.

    Raises:
        OSError: the disk is full or gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb", buffering=0) as file:
        hashed = _Hashing(file)
        write(hashed)
        if hashed.error is not None:
            raise hashed.error
        os.fsync(file.fileno())
    return {"bytes": hashed.bytes, "sha256": hashed.digest.hexdigest()}


class _Hashing:
    """A file to write to. An error of the disk is kept: torch's zip writer would not survive it."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.bytes = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.bytes += len(view)
        self.digest.update(view)
        rest = view
        while rest and self.error is None:
            try:
                rest = rest[self._file.write(rest) :]
            except OSError as error:
                self.error = error
        return len(view)

    def flush(self) -> None:
        """Nothing is buffered."""


def _link(source: Path, path: Path, entry: dict[str, Any]) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, path)
    except OSError:  # a file system without hard links
        return write_hashed(path, lambda file: copy_into(file, source))
    return entry


def copy_into(file: IO[bytes], source: Path) -> None:
    """Write what is in another file.

    Raises:
        OSError: that cannot be read.
    """
    with source.open("rb") as content:
        while piece := content.read(2**24):
            file.write(piece)


def sync_folder(folder: Path) -> None:
    """See names and renames in a folder onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
