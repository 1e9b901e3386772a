"""Samples of an uncompressed tar file, from any sample's first byte on.

Headers are read by the standard library; the blocks between them are read here, because a position
in bytes and a limit on every size are what its stream reader, and webdataset's, do not offer.
Tars behind each other in one file, as `cat` and `tar -A` make them, are read as one.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol
from unicodedata import category

from webdataset.tariterators import base_plus_ext

from coca_scale.data.sample import COMPRESSED

BLOCK = tarfile.BLOCKSIZE
MAX_HEADER_BYTES = 2**20
MAX_FILE_BYTES = 2**40  # keeps every position far below what a file can have
MAX_DIGITS = 19
MAX_PADDING_BYTES = 2**20  # between tars behind each other
FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
HARMLESS = (tarfile.DIRTYPE,)
WITHOUT_CONTENT = (tarfile.DIRTYPE, tarfile.LNKTYPE)  # whatever size they name
PAX_HEADERS = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
PASSED_OVER = (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK)
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
}
_USTAR = slice(257, 262)  # of a header


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
        TarFault: truncated_shard, broken_shard, compressed_shard or empty_shard; samples before it
            have been given.
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
    controls = any(category(character) == "Cc" for character in member.name)
    if member.name.startswith(("/", "\\")) or ".." in parts or controls:
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
            behind = _next_tar(file, position)
            if behind is None:
                return
            position, name, pax = behind, None, {}
            continue
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            if position:
                return  # resumed right at the end
            raise TarFault("empty_shard") from error
        except tarfile.HeaderError as error:
            raise TarFault(_fault_of_header(block, position)) from error
        size = _size(info, pax)
        member = _Member(name or pax.get("path", info.name), info.type, position + BLOCK, size)
        if info.type == tarfile.GNUTYPE_SPARSE or any("sparse" in key for key in pax):
            raise TarFault("broken_shard")  # a sparse file is any size at no cost
        position = member.end
        if info.type in PAX_HEADERS:
            pax = _pax_records(_header_content(file, member))
        elif info.type == tarfile.GNUTYPE_LONGNAME:
            name = _header_content(file, member).rstrip(b"\0").decode("utf-8", "replace")
        elif info.type not in PASSED_OVER:
            if info.type not in HARMLESS:
                yield member
            name, pax = None, {}


def compression(begin: bytes) -> str | None:
    """What a file is compressed by, as its first bytes say."""
    return next((name for mark, name in COMPRESSIONS.items() if begin.startswith(mark)), None)


def _fault_of_header(block: bytes, position: int) -> str:
    if position == 0 and compression(block) is not None:
        return COMPRESSED
    return "truncated_shard" if len(block) < BLOCK else "broken_shard"


def _next_tar(file: TarBytes, position: int) -> int | None:
    """Where another tar begins behind the end mark at `position`; what is no tar is passed over.

    Raises:
        TarFault: truncated_shard, where more zeros follow than anybody pads with: a file system
            leaves them in place of what was not written.
    """
    for behind in range(position + BLOCK, position + MAX_PADDING_BYTES, BLOCK):
        file.seek(behind)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            return None
        if any(block):
            return behind if block[_USTAR] == b"ustar" else None
    raise TarFault("truncated_shard")


def _size(info: tarfile.TarInfo, pax: Mapping[str, str]) -> int:
    """Bytes of content behind a header, which is where every number of a tar enters."""
    if info.type in WITHOUT_CONTENT:
        return 0
    size = info.size
    headers = (*PAX_HEADERS, *PASSED_OVER, tarfile.GNUTYPE_LONGNAME)
    if "size" in pax and info.type not in headers:
        size = _number(pax["size"].encode())
    if not 0 <= size <= MAX_FILE_BYTES:
        raise TarFault("broken_shard")
    return size


def _number(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > MAX_DIGITS:
        raise TarFault("broken_shard")
    return int(digits)


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
    begin = 0
    while begin < len(content) and content[begin]:  # some writers fill up with zeros
        space = content.find(b" ", begin, begin + MAX_DIGITS + 1)
        end = begin + _number(content[begin : max(space, begin)])
        if not space < end <= len(content):
            raise TarFault("broken_shard")
        key, equals, value = content[space + 1 : end - 1].partition(b"=")
        if not equals:
            raise TarFault("broken_shard")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        begin = end
    return records
