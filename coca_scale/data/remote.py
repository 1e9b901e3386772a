"""Remote objects behind fsspec urls; this module alone knows fsspec and its clients.

Credentials come from the environment, as boto3 and google-auth find them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
from fsspec.implementations.local import LocalFileSystem

from coca_scale.data.retries import StorageError, first_line, with_retries

UPLOAD_PART_BYTES = 2**24
PART_ATTEMPTS = 3  # before all of a large file goes again
UPLOAD_PARTS_AT_ONCE = 2  # of one file, so that uploads take little memory
SECONDS_FOR_BYTES = 2**22  # what `timeout_seconds` is meant for
GONE = (404, 410)
DENIED = (401, 403)


class NoRangesError(StorageError):
    """A server that sends whole files only."""


@contextmanager
def _client_faults() -> Iterator[None]:
    """What the clients raise inside becomes an OSError; what is one passes as it is."""
    try:
        yield
    except OSError:
        raise
    except _client_errors() as error:
        raise OSError(first_line(error)) from error


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


@_client_faults()
def upload(source: Path | bytes, url: str, timeout_seconds: float) -> None:
    """Make an object of a file or of bytes; until all of it is there, the one before stays.

    Args:
        source: what it will be.
        url: of the object.
        timeout_seconds: longest wait for 4 MiB.

    Raises:
        FileNotFoundError: there is no such bucket, or no such file.
        PermissionError: access is denied.
        OSError: a fault of the server, which may pass.
        StorageError: a kind of url that is not known or not written to, or whose package is not
            installed.
    """
    system, path = _file_system(url, timeout_seconds)
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    target, options = path, dict[str, Any]()
    if isinstance(system, LocalFileSystem):
        target = f"{path}.tmp"
        system.makedirs(str(Path(path).parent), exist_ok=True)
    if system.async_impl:
        options["timeout"] = timeout_seconds * (2 + size / SECONDS_FOR_BYTES)
    if "s3" in system.protocol:
        system.retries = PART_ATTEMPTS
        options |= {"chunksize": UPLOAD_PART_BYTES, "max_concurrency": UPLOAD_PARTS_AT_ONCE}
    try:
        if isinstance(source, bytes):
            system.pipe_file(target, source, **options)
        else:
            system.put_file(str(source), target, **options)
    except NotImplementedError as error:
        raise StorageError(f"{url}: cannot be written to") from error
    if target != path:
        system.mv(target, path)
    if (there := _size_of(system, path)) != size:
        raise OSError(f"{there} bytes are there where {size} were written")


@_client_faults()
def remove_object(url: str, timeout_seconds: float) -> None:
    """Remove an object, if it is there.

    Raises:
        PermissionError: access is denied.
        OSError: a fault of the server, which may pass.
        StorageError: a kind of url that is not known, or whose package is not installed.
    """
    system, path = _file_system(url, timeout_seconds)
    with suppress(FileNotFoundError):
        system.rm_file(path)


@_client_faults()
def sizes_below(url: str, timeout_seconds: float) -> dict[str, int]:
    """Bytes of all objects below a url, by what their names have behind it; there may be none.

    Raises:
        FileNotFoundError: there is no such bucket.
        PermissionError: access is denied.
        OSError: a fault of the server, which may pass.
        StorageError: a kind of url that is not known, or whose package is not installed.
    """
    system, path = _file_system(url, timeout_seconds)
    root = path.rstrip("/") + "/"
    found = system.find(path, detail=True)
    inside = {name: about for name, about in found.items() if name.startswith(root)}
    return {name.removeprefix(root): int(about["size"]) for name, about in inside.items()}


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
        from google.auth.exceptions import GoogleAuthError

        kinds += [HttpError, GoogleAuthError]
    except ImportError:
        pass
    return tuple(kinds)
