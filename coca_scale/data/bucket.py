"""A folder of objects that is written to: in a bucket, or on a disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from coca_scale.data.remote import remove_object, sizes_below, upload
from coca_scale.data.retries import StorageError, first_line, with_retries
from coca_scale.data.storage import CHUNK_BYTES, StorageOptions, open_shard, read_whole

_PROBE_FOLDER, _PROBE = ".probe", "probe"
T = TypeVar("T")


class Bucket:
    """Objects below a url. What may pass is tried again, as `options` say.

    Args:
        url: of fsspec (s3://bucket/runs/large), or a folder.
        options: how often to try again, and how long to wait; `cache_dir` is not used.
    """

    def __init__(self, url: str, options: StorageOptions) -> None:
        self.url = url.rstrip("/")
        self._retries, self._timeout = options.retries, options.timeout_seconds
        self._reading = StorageOptions(options.retries, options.timeout_seconds)

    def put(self, source: Path | bytes, name: str) -> None:
        """Make an object of a file or of bytes; until all of it is there, the one before stays.

        Raises:
            StorageError: it cannot be written.
        """
        self._tried(lambda url: upload(source, url, self._timeout), name)

    def pieces(self, name: str) -> Iterator[bytes]:
        """The content of an object.

        Raises:
            FileNotFoundError: there is none.
            StorageError: it cannot be read.
        """
        with open_shard(self._url_of(name), self._reading) as file:
            while piece := file.read(CHUNK_BYTES):
                yield piece

    def read(self, name: str) -> bytes:
        """The same of a small object, as a whole."""
        return read_whole(self._url_of(name), self._reading)

    def remove(self, name: str) -> None:
        """Remove an object, if it is there.

        Raises:
            StorageError: it cannot be removed.
        """
        self._tried(lambda url: remove_object(url, self._timeout), name)

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of all objects in a folder and its folders, by their names in it.

        Raises:
            StorageError: the bucket cannot be listed.
        """
        return self._tried(lambda url: sizes_below(url, self._timeout), folder)

    def check(self) -> None:
        """See that objects can be written, listed, read and removed.

        Raises:
            StorageError: they cannot.
        """
        name, content = f"{_PROBE_FOLDER}/{_PROBE}", _PROBE.encode()
        self.put(content, name)
        if self.read(name) != content or _PROBE not in self.sizes(_PROBE_FOLDER):
            raise StorageError(f"{self.url}: what was written there is not found again")
        self.remove(name)

    def _url_of(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def _tried(self, action: Callable[[str], T], name: str) -> T:
        url = self._url_of(name)
        try:
            return with_retries(lambda: action(url), url, self._retries)
        except FileNotFoundError as error:
            raise StorageError(f"{url}: not found: {first_line(error)}") from error
