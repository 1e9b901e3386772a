"""Bytes of shards from local files, fsspec urls and `pipe:` commands, read on after every fault.

Remote objects are read in ranges: a range that is late, short or refused is asked for again, so a
connection that breaks in the middle of a shard costs that range and nothing else. Credentials come
from the environment, as boto3 and google-auth find them.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import aiohttp
import fsspec

from coca_scale.errors import UserError

T = TypeVar("T")

CHUNK_BYTES = 2**22
READ_AHEAD_THREADS = 32
FIRST_WAIT_SECONDS = 0.2
LONGEST_WAIT_SECONDS = 30.0
PIPE = "pipe:"
GONE = (404, 410)
DENIED = (401, 403)


class StorageError(UserError, OSError):
    """A shard that cannot be read, after all retries."""


class NoRangesError(StorageError):
    """A server that sends whole files only."""


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


def with_retries(
    action: Callable[[], T], url: str, retries: int, reset: Callable[[], None] = lambda: None
) -> T:
    """The result of `action`, tried again with growing pauses after an OSError, which may pass.

    Raises:
        FileNotFoundError: there is no such object; it is not asked for again.
        StorageError: access is denied, or the last attempt failed too.
    """
    for attempt in range(retries + 1):
        try:
            return action()
        except (FileNotFoundError, StorageError):
            raise
        except PermissionError as error:
            raise StorageError(f"{url}: access denied: {first_line(error)}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            reset()
            if attempt == retries:
                raise StorageError(
                    f"{url}: failed {retries + 1} times, last with {first_line(error)}"
                ) from error
        pause = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2**attempt)
        time.sleep(pause * random.uniform(0.5, 1.0))  # ranks must not come back in step
    raise AssertionError("unreachable")


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


@contextmanager
def _client_faults() -> Iterator[None]:
    """What the clients raise inside becomes an OSError; what is one passes as it is."""
    try:
        yield
    except OSError:
        raise
    except _client_errors() as error:
        raise OSError(first_line(error)) from error


def list_remote(pattern: str, retries: int, timeout_seconds: float) -> list[str]:
    """Urls of a bucket that match a glob pattern, sorted.

    Raises:
        FileNotFoundError: there is no such bucket.
        StorageError: the bucket cannot be listed.
    """

    @_client_faults()
    def listing() -> list[str]:
        system, path = _file_system(pattern, timeout_seconds)
        return sorted(system.unstrip_protocol(name) for name in system.glob(path))

    return with_retries(listing, pattern, retries)


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
            self._file = self._path.open("rb")
        self._file.seek(position)
        return self._file.read(size)

    def reset(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class RemoteReader:
    """Ranges of an object; knows its size, so that a short answer is noticed."""

    def __init__(self, url: str, timeout_seconds: float) -> None:
        self._url = url
        self._timeout = timeout_seconds
        self._size: int | None = None

    @_client_faults()
    def read_at(self, position: int, size: int) -> bytes:
        """Bytes from `position` on, fewer than `size` only at the end of the object.

        Raises:
            FileNotFoundError: there is no such object.
            PermissionError: access is denied.
            OSError: the answer is late, short or a fault of the server, which may pass.
            NoRangesError: the server sends whole files only.
            StorageError: a kind of url that is not known, or whose package is not installed.
        """
        system, path = _file_system(self._url, self._timeout)
        if self._size is None:
            self._size = _size_of(system, path)
        end = min(position + size, self._size)
        if position >= end:
            return b""
        limit = {"timeout": self._timeout} if system.async_impl else {}
        data = system.cat_file(path, start=position, end=end, **limit)
        if len(data) > end - position:
            raise NoRangesError(f"{self._url}: the server gives no parts; set data.cache_dir")
        if len(data) < end - position:
            raise OSError(f"{len(data)} bytes came where {end - position} were asked for")
        return bytes(data)

    def reset(self) -> None:
        """Each range is a request of its own."""


def _size_of(system: Any, path: str) -> int:
    """Size of an object.

    Raises:
        FileNotFoundError: only where the server says so; fsspec says it for any fault.
    """
    try:
        info = system.info(path)
    except FileNotFoundError as error:
        cause = error.__cause__
        if isinstance(cause, aiohttp.ClientResponseError) and cause.status not in GONE:
            if cause.status in DENIED:
                raise PermissionError(f"status {cause.status}") from error
            raise OSError(f"status {cause.status}") from error
        if isinstance(cause, aiohttp.ClientError | TimeoutError | asyncio.TimeoutError):
            raise OSError(first_line(cause)) from error
        raise
    if info.get("size") is None:
        raise OSError("the server does not tell the size")
    return int(info["size"])


def _file_system(url: str, timeout_seconds: float) -> tuple[Any, str]:
    """The fsspec file system of a url, and the path in it.

    Raises:
        StorageError: a kind of url that is not known, or whose package is not installed.
    """
    scheme = url.partition("://")[0]
    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        limit = aiohttp.ClientTimeout(sock_connect=timeout_seconds, sock_read=timeout_seconds)
        options = {"client_kwargs": {"timeout": limit}}
    elif scheme == "s3":
        limits = {"connect_timeout": timeout_seconds, "read_timeout": timeout_seconds}
        options = {"config_kwargs": {**limits, "retries": {"max_attempts": 0}}}
    try:
        system, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    except (ValueError, ImportError) as error:
        raise StorageError(f"{url}: {first_line(error)}") from error
    if scheme == "s3":
        system.retries = 1  # attempts are counted here, not in three places
    return system, path


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
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"
    if path.is_file():
        return str(path)
    folder.mkdir(parents=True, exist_ok=True)
    if options.cache_bytes is not None:
        kept = sum(entry.stat().st_size for entry in os.scandir(folder))
        if kept >= options.cache_bytes:
            return None
    temporary = path.with_suffix(f".{os.getpid()}.{random.getrandbits(32):08x}.tmp")
    try:
        _download(url, temporary, options)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return str(path)


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


@_client_faults()
def download_whole(url: str, target: Path, timeout_seconds: float) -> None:
    """Copy an object in one piece, as servers without ranges send it.

    Raises:
        FileNotFoundError: there is no such object.
        PermissionError: access is denied.
        OSError: the answer is late, short or a fault of the server, which may pass.
        StorageError: a kind of url that is not known, or whose package is not installed.
    """
    system, path = _file_system(url, timeout_seconds)
    system.get_file(path, str(target))
    came, size = target.stat().st_size, _size_of(system, path)
    if came != size:
        raise OSError(f"{came} bytes came where {size} were asked for")


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of this process; those of a parent do not survive a fork."""
    return ThreadPoolExecutor(READ_AHEAD_THREADS, f"read-ahead-{process}")


@lru_cache(maxsize=1)
def _client_errors() -> tuple[type[Exception], ...]:
    """Faults that may pass and are no OSErrors, of whatever clients are installed."""
    kinds: list[type[Exception]] = [asyncio.TimeoutError, aiohttp.ClientError]
    try:
        from botocore.exceptions import BotoCoreError, ClientError

        kinds += [BotoCoreError, ClientError]
    except ImportError:
        pass
    try:
        from gcsfs.retry import HttpError

        kinds.append(HttpError)
    except ImportError:
        pass
    return tuple(kinds)


def first_line(error: BaseException) -> str:
    """What an exception says, or its name if it says nothing."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
