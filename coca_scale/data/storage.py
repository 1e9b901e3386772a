"""Bytes of shards from local files, fsspec urls and `pipe:` commands, read on after every fault.

Remote objects are read in ranges: a range that is late, short or refused is asked for again, so a
connection that breaks in the middle of a shard costs that range and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import random
import select
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Protocol

from coca_scale.data.remote import NoRangesError, RemoteReader, download_whole
from coca_scale.data.retries import StorageError, with_retries
from coca_scale.errors import refusal
from coca_scale.recipe.text import tell

CHUNK_BYTES = 2**22
READ_AHEAD_THREADS = 32
PIPE = "pipe:"


@dataclass(frozen=True)
class StorageOptions:
    """How often to try again, and where to keep copies.

    Attributes:
        retries: further attempts per read.
        timeout_seconds: longest wait for 4 MiB.
        cache_dir: where copies of remote shards are kept.
        cache_bytes: most that is kept there; further shards are read remotely.
    """

    retries: int = 5
    timeout_seconds: float = 60.0
    cache_dir: Path | None = None
    cache_bytes: int | None = None


class _Reader(Protocol):
    """Reads anywhere; only `reset` is called after a fault."""

    def read_at(self, position: int, size: int) -> bytes: ...

    def reset(self) -> None: ...


class ShardFile:
    """A shard opened for reading; `open_shard` makes it."""

    def __init__(self, url: str, reader: _Reader, options: StorageOptions) -> None:
        self._url = url
        self._reader = reader
        self._options = options
        self._ahead = isinstance(reader, RemoteReader)
        self._position = 0
        self._chunk, self._chunk_begin = b"", 0
        self._next: tuple[int, Future[bytes]] | None = None

    def close(self) -> None:
        """Let go of files, commands and what is on its way."""
        if self._next is not None:
            self._next[1].cancel()
        self._reader.reset()

    def seek(self, position: int) -> None:
        """Go on reading at byte `position`."""
        self._position = position

    def read(self, size: int) -> bytes:
        """The next `size` bytes, fewer only at the end of the shard.

        Raises:
            FileNotFoundError: there is no such shard.
            StorageError: it cannot be read.
        """
        pieces = []
        while size > 0:
            offset = self._position - self._chunk_begin
            if not 0 <= offset < len(self._chunk):
                chunk = self._fetch()
                if not chunk:  # the last one stays, for who looks back
                    break
                self._chunk, self._chunk_begin, offset = chunk, self._position, 0
            piece = self._chunk[offset : offset + size]
            pieces.append(piece)
            size -= len(piece)
            self._position += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _fetch(self) -> bytes:
        """The chunk at the current position, while the one behind it is already on its way."""
        begin, waiting = self._position, self._next
        if waiting is not None and waiting[0] == begin:
            chunk = waiting[1].result()
        else:
            if waiting is not None:
                waiting[1].cancel()
            chunk = self._read_with_retries(begin)
        self._next = None
        if self._ahead and len(chunk) == CHUNK_BYTES:
            behind = begin + len(chunk)
            self._next = (behind, _pool(os.getpid()).submit(self._read_with_retries, behind))
        return chunk

    def _read_with_retries(self, position: int) -> bytes:
        return with_retries(
            lambda: self._reader.read_at(position, CHUNK_BYTES),
            self._url,
            self._options.retries,
            self._reader.reset,
        )


@contextmanager
def open_shard(url: str, options: StorageOptions) -> Iterator[ShardFile]:
    """A shard, closed at the end of the block; nothing is read yet.

    Raises:
        FileNotFoundError: there is none, and it was to be downloaded into the cache.
        StorageError: the download failed.
    """
    path = url if is_local(url) else _cached(url, options)
    reader = _LocalReader(path) if path is not None else _remote_reader(url, options)
    file = ShardFile(url, reader, options)
    try:
        yield file
    finally:
        file.close()


def read_whole(url: str, options: StorageOptions) -> bytes:
    """A small file, such as a manifest, as a whole.

    Raises:
        FileNotFoundError: there is none.
        StorageError: it cannot be read.
    """
    pieces = []
    with open_shard(url, options) as file:
        while piece := file.read(CHUNK_BYTES):
            pieces.append(piece)
    return b"".join(pieces)


def is_local(url: str) -> bool:
    """Whether a shard is a plain file."""
    return "://" not in url and not url.startswith(PIPE)


def _remote_reader(url: str, options: StorageOptions) -> _PipeReader | RemoteReader:
    kind = _PipeReader if url.startswith(PIPE) else RemoteReader
    return kind(url, options.timeout_seconds)


class _LocalReader:
    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._file: BinaryIO | None = None

    def read_at(self, position: int, size: int) -> bytes:
        if self._file is None:
            if self._path.exists() and not self._path.is_file():
                raise StorageError(f"{self._path}: not a regular file")  # opening could hang
            self._file = self._path.open("rb")
        self._file.seek(position)
        return self._file.read(size)

    def reset(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class _PipeReader:
    """Output of a command; one that fails is run again, and read past what we have."""

    def __init__(self, url: str, timeout_seconds: float) -> None:
        self._command = url.removeprefix(PIPE)
        self._timeout = timeout_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._at = 0

    def read_at(self, position: int, size: int) -> bytes:
        if self._process is None or position < self._at:
            self.reset()
            self._process = subprocess.Popen(
                self._command, shell=True, stdout=subprocess.PIPE, start_new_session=True
            )
            self._at = 0
        while self._at < position:
            if not self._some(min(CHUNK_BYTES, position - self._at)):
                return b""
        pieces, left = [], size
        while left and (piece := self._some(left)):
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def _some(self, size: int) -> bytes:
        """Up to `size` bytes; none once the command has ended well."""
        assert self._process is not None and self._process.stdout is not None
        pipe = self._process.stdout
        if not select.select([pipe], [], [], self._timeout)[0]:
            raise OSError(f"no output for {self._timeout:g} s")
        piece = os.read(pipe.fileno(), size)
        self._at += len(piece)
        if not piece and (status := self._process.wait(self._timeout)):
            raise OSError(f"exit status {status}")
        return piece

    def reset(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdout is not None
        process.stdout.close()
        if process.poll() is None:
            os.killpg(process.pid, 9)
        process.wait()


def _cached(url: str, options: StorageOptions) -> str | None:
    """A local copy, downloaded if there is to be one and there is room for it."""
    folder = options.cache_dir
    if folder is None:
        return None
    try:
        return _kept(url, folder, options)
    except (FileNotFoundError, StorageError):
        raise
    except OSError as error:  # of the disk: what is remote has errors of its own
        _say_once(f"warning: data.cache_dir={folder} keeps no more shards: {refusal(error)}")
        return None


@lru_cache
def _say_once(message: str) -> None:
    tell(message)


def _kept(url: str, folder: Path, options: StorageOptions) -> str | None:
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"
    if path.is_file():
        return str(path)
    folder.mkdir(parents=True, exist_ok=True)
    if options.cache_bytes is not None and _bytes_in(folder) >= options.cache_bytes:
        return None
    temporary = path.with_suffix(f".{os.getpid()}.{random.getrandbits(32):08x}.tmp")
    try:
        _download(url, temporary, options)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return str(path)


def _bytes_in(folder: Path) -> int:
    total = 0
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):  # another process has given it its name meanwhile
            total += entry.stat().st_size
    return total


def _download(url: str, target: Path, options: StorageOptions) -> None:
    try:
        streamed = replace(options, cache_dir=None)
        with open_shard(url, streamed) as file, target.open("wb") as copy:
            while piece := file.read(CHUNK_BYTES):
                copy.write(piece)
    except NoRangesError:
        with_retries(
            lambda: download_whole(url, target, options.timeout_seconds), url, options.retries
        )


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of this process; those of a parent do not survive a fork."""
    return ThreadPoolExecutor(READ_AHEAD_THREADS, f"read-ahead-{process}")
