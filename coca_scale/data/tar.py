"""Samples of an uncompressed tar file, from any sample's first byte on.

Headers are read by the standard library; the blocks between them are read here, because a position
in bytes and a limit on every size are what its stream reader, and webdataset's, do not offer.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from webdataset.tariterators import base_plus_ext

BLOCK = tarfile.BLOCKSIZE
MAX_HEADER_BYTES = 2**20
FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
HARMLESS = (tarfile.DIRTYPE,)


class TarBytes(Protocol):
    """What is needed of a file."""

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer only at the end."""
        ...

    def seek(self, position: int) -> None:
        """Go on reading at `position`."""
        ...


class TarFault(Exception):
    """The rest of the archive cannot be read; `cause` says why."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


@dataclass
class Run:
    """Neighbouring members with one key: a sample.

    Attributes:
        key: member name up to the first dot after the last slash.
        files: content by lower-case extension; None for extensions that were not asked for.
        fault: what makes it unusable, None if nothing does.
        copies: how often the whole sample came again right behind itself.
        end: position of the first byte behind it.
    """

    key: str
    files: dict[str, bytes | None] = field(default_factory=dict)
    fault: str | None = None
    copies: int = 0
    end: int = 0


def read_runs(file: TarBytes, start: int, limits: Mapping[str, int]) -> Iterator[Run]:
    """Samples from byte `start` on, which is 0 or the `end` of a sample.

    Content is read for extensions in `limits`, which say the most bytes; all else is passed over.

    Raises:
        TarFault: truncated_shard, broken_shard or empty_shard; samples before it have been given.
    """
    run: Run | None = None
    repeats: Counter[str] = Counter()
    for member in _members(file, start):
        key, extension = base_plus_ext(member.name)
        if key is None or key.rsplit("/", 1)[-1].startswith("._"):
            continue  # no extension, or what macOS adds
        if run is None or run.key != key:
            if run is not None:
                yield run
            run = Run(key)
            repeats.clear()
        extension = extension.lower()
        run.end = member.end
        if extension in run.files:
            repeats[extension] += 1
            run.copies = max(repeats.values())
            continue
        run.files[extension] = None
        limit = limits.get(extension)
        run.fault = run.fault or _fault_of(member, limit)
        if run.fault is None and limit is not None:
            file.seek(member.begin)
            content = file.read(member.size)
            if len(content) < member.size:
                raise TarFault("truncated_shard")
            run.files[extension] = content
    if run is not None:
        yield run


@dataclass(frozen=True)
class _Member:
    name: str
    kind: bytes
    begin: int
    size: int

    @property
    def end(self) -> int:
        return self.begin + -(-self.size // BLOCK) * BLOCK


def _fault_of(member: _Member, limit: int | None) -> str | None:
    parts = member.name.replace("\\", "/").split("/")
    if member.name.startswith(("/", "\\")) or ".." in parts or not member.name.isprintable():
        return "unsafe_name"
    if member.kind not in FILES:
        return "unsafe_member"  # links, devices
    return "oversized_file" if limit is not None and member.size > limit else None


def _members(file: TarBytes, position: int) -> Iterator[_Member]:
    """Members with their names; long names and pax headers are applied."""
    name: str | None = None
    pax: dict[str, str] = {}
    first = position
    while True:
        file.seek(position)
        block = file.read(BLOCK)
        if not block and position > first:  # no end mark: some writers leave it out
            file.seek(position - 1)
            if not file.read(1):
                raise TarFault("truncated_shard")
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            return
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            if position:
                return  # resumed right at the end
            raise TarFault("empty_shard") from error
        except tarfile.TruncatedHeaderError as error:  # type: ignore[attr-defined]
            raise TarFault("truncated_shard") from error
        except tarfile.HeaderError as error:
            raise TarFault("broken_shard") from error
        size = int(pax.get("size", info.size))
        member = _Member(name or pax.get("path", info.name), info.type, position + BLOCK, size)
        if size < 0 or info.type == tarfile.GNUTYPE_SPARSE or any("sparse" in k for k in pax):
            raise TarFault("broken_shard")  # a sparse file is any size at no cost
        position = member.end
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            content = _header_content(file, member)
            if info.type == tarfile.XHDTYPE:
                pax = _pax_records(content)
            else:
                name = content.rstrip(b"\0").decode("utf-8", "replace")
            continue
        if info.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK, *HARMLESS):
            yield member
        name, pax = None, {}


def _header_content(file: TarBytes, member: _Member) -> bytes:
    if member.size > MAX_HEADER_BYTES:
        raise TarFault("broken_shard")
    content = file.read(member.size)
    if len(content) < member.size:
        raise TarFault("truncated_shard")
    return content


def _pax_records(content: bytes) -> dict[str, str]:
    """Records "LENGTH KEY=VALUE\\n" of a pax header (POSIX.1-2001)."""
    records = {}
    while content:
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(content):
            raise TarFault("broken_shard")
        key, equals, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        if not equals or (key == b"size" and not value.isdigit()):
            raise TarFault("broken_shard")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        content = content[int(length) :]
    return records
