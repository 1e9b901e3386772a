"""Files that are there as a whole or not at all, whatever a full disk or the end of a program does.

What a name stood for before stays until all of the new file is on the disk.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file; text as UTF-8, whatever the locale. The rest is as of `whole_file`."""
    with whole_file(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode())


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to be filled, which has its name when the block has ended.

    A link, a pipe or a device is written into as it is.

    Raises:
        OSError: naming `path`: it cannot be written, whatever a library in the block made of that;
            nothing half written is left.
    """
    with whole_path(path) as place, NamedFile(str(place), "wb") as raw:
        file = io.BufferedWriter(raw, 2**16)
        try:
            yield cast(BinaryIO, file)
            file.flush()
            raw.sync()
        except Exception as error:
            if raw.fault is None or error is raw.fault:
                raise
            raise raw.fault from error


@contextmanager
def whole_path(path: Path) -> Iterator[Path]:
    """The same for what only writes to a name: the block fills the file at the path it gets.

    Raises:
        OSError: naming `path`.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        yield path
        return
    begin = os.fsdecode(os.fsencode(path.name)[:200])  # a name may have 255 bytes
    temporary = path.with_name(f"{begin}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # libraries may think of a narrower one
        yield temporary
        temporary.chmod(mode)
        temporary.replace(path)
    except OSError as error:
        if error.filename != str(temporary):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


class NamedFile(io.FileIO):
    """A file whose faults name it, and are remembered."""

    fault: OSError | None = None

    def write(self, data: object) -> int:
        """As of any file."""
        with self._remembering():
            return super().write(data)  # type: ignore[arg-type]

    def sync(self) -> None:
        """See it onto the disk, where there is one behind it."""
        if Path(str(self.name)).is_file():
            with self._remembering():
                os.fsync(self.fileno())

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.fault = OSError(error.errno, error.strerror, str(self.name))
            raise self.fault from error
