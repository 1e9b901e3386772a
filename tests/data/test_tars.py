"""Tar files as tools, accidents and attackers make them."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import tarfile
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coca_scale.data.inspection import inspect_shards
from coca_scale.data.rules import LIMITS, SampleRules
from coca_scale.data.sample import BadSample, DataError, RawSample
from coca_scale.data.shards import read_shard
from coca_scale.data.sources import open_source
from coca_scale.data.storage import StorageOptions
from coca_scale.data.tar import TarFault, read_runs
from tests.conftest import tiny_recipe
from tests.data.loading import loader
from tests.data.shards import encoded, write_shards

DATA = tiny_recipe().data
PICTURE = encoded()
END = bytes(2 * tarfile.BLOCKSIZE)


def member(name, content=b"", kind=tarfile.REGTYPE, size=None):
    """A member with its header, whatever `size` the header names."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, 0 if isinstance(size, bytes) else len(content)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if size is not None:
        header[124:136] = size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def pax(*records):
    """A pax header with records (key, value), their lengths counted as POSIX has it."""
    content = b""
    for key, value in records:
        rest = b" " + key + b"=" + value + b"\n"
        length = len(rest)
        while len(str(length)) + len(rest) != length:
            length = len(str(length)) + len(rest)
        content += str(length).encode() + rest
    return member("pax", content, tarfile.XHDTYPE)


def sample(key):
    """A whole sample."""
    return member(f"{key}.jpg", PICTURE) + member(f"{key}.txt", b"words")


def found_in(content):
    """Keys and faults of a tar in memory, in order."""
    file = io.BytesIO(content)
    found = []
    try:
        for run in read_runs(file, 0, LIMITS):
            found.append(run.fault or run.key)
    except TarFault as fault:
        found.append(fault.cause)
    return found


def found_by_reader(path):
    """Keys and causes as the reader of shards gives them."""
    entries = read_shard(str(path), SampleRules({}, DATA.filters), StorageOptions(0))
    return [e.cause if isinstance(e, BadSample) else e.key for e in entries]


def base256(number):
    """A size as GNU tar writes those beyond 8 GiB; negative ones too."""
    return (
        number.to_bytes(12, "big", signed=True)
        if number < 0
        else b"\x80" + number.to_bytes(11, "big")
    )


@pytest.mark.parametrize("name", ["b.jpg", "b.bin"])
@pytest.mark.parametrize(
    ("size", "cause"),
    [
        (base256(2**80), "broken_shard"),
        (base256(2**63 - 512), "broken_shard"),
        (base256(2**63), "broken_shard"),
        (base256(-512), "broken_shard"),
        (base256(-(2**90)), "broken_shard"),
        (b"7" * 11 + b"\0", "truncated_shard"),
        (b"89abcdefghi\0", "broken_shard"),
    ],
)
def test_no_size_takes_more_than_the_rest_of_its_shard(tmp_path, name, size, cause):
    path = tmp_path / "x.tar"
    # a sample is whole when the next one begins
    path.write_bytes(sample("a") + sample("b") + member(name, size=size) + sample("c") + END)
    found = found_by_reader(path)
    assert found == ["a", cause] or found == ["a", "b", cause]


@pytest.mark.parametrize("value", ["9" * 5000, "9" * 30, "", "-1", "1e9", "٣", "²", "1_0", " 7"])
def test_sizes_of_pax_headers_are_whole_numbers_in_range(tmp_path, value):
    path = tmp_path / "x.tar"
    broken = pax((b"size", value.encode())) + member("b.jpg", PICTURE)
    begin = sample("a") + sample("b")
    path.write_bytes(begin + broken + sample("c") + END)
    assert found_by_reader(path) == ["a", "broken_shard"]
    length = member("pax", value.encode() + b" size=1\n", tarfile.XHDTYPE)
    assert found_in(begin + length + sample("c") + END) == ["a", "broken_shard"]


@settings(max_examples=300, deadline=None)
@given(
    size=st.binary(min_size=12, max_size=12),
    records=st.lists(st.tuples(st.sampled_from([b"size", b"path", b"x"]), st.binary(max_size=40))),
    kind=st.binary(min_size=1, max_size=1),
)
def test_no_number_or_record_escapes(size, records, kind):
    odd = pax(*records) + member("o.jpg", PICTURE, kind, size)
    found = found_in(sample("a") + sample("b") + odd + sample("c") + END)
    assert found[0] == "a"
    assert set(found) - {"a", "b", "c", "o"} <= {
        *("broken_shard", "truncated_shard", "unsafe_name", "unsafe_member", "oversized_file"),
        *(r[1].decode("utf-8", "replace").partition(".")[0] for r in records),
    }


def test_what_has_no_content_takes_no_blocks():
    for kind in (tarfile.DIRTYPE, tarfile.LNKTYPE):
        assert found_in(member("x", kind=kind, size=b"00000000777\0") + sample("a") + END) == ["a"]
    twice = pax((b"size", b"3")) + pax((b"path", b"c.jpg")) + member("b.jpg", PICTURE) + END
    assert found_in(twice) == ["c"]
    solaris = member("x", b"14 path=c.jpg\n", tarfile.SOLARIS_XHDTYPE)
    assert found_in(solaris + member("b.jpg", PICTURE) + END) == ["c"]
    names = member("././@LongLink", b"long.jpg\0", tarfile.GNUTYPE_LONGNAME)
    link = member("././@LongLink", b"to.jpg\0", tarfile.GNUTYPE_LONGLINK)
    for before in (names + link, link + names):
        assert found_in(before + member("b.jpg", PICTURE) + END) == ["long"]


def test_tars_behind_each_other_are_read_as_one(tmp_path):
    write_shards(tmp_path, [3, 2, 4])
    parts = [tmp_path / f"{number:03d}.tar" for number in range(3)]
    keys = [key for part in parts for key in found_by_reader(part)]
    assert len(keys) == 9
    joined = tmp_path / "joined.tar"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert found_by_reader(joined) == keys
    appended = tmp_path / "appended.tar"
    appended.write_bytes(parts[0].read_bytes())
    for part in parts[1:]:
        subprocess.run(["tar", "-Af", appended, part], check=True)
    assert found_by_reader(appended) == keys
    content = joined.read_bytes()
    for behind in (b"rubbish" * 1000, bytes(10**4), b"x"):
        joined.write_bytes(content + behind)
        assert found_by_reader(joined) == keys
    joined.write_bytes(content + sample("z")[:1000])
    assert found_by_reader(joined) == [*keys, "truncated_shard"]
    joined.write_bytes(content + sample("z").replace(b"z.jpg", b"Z.jpg") + END)  # wrong checksum
    assert found_by_reader(joined) == [*keys[:-1], "broken_shard"]
    joined.write_bytes(content + bytes(2 * 2**20))  # never written
    assert found_by_reader(joined) == [*keys[:-1], "truncated_shard"]
    joined.write_bytes(bytes(2 * 2**20))
    assert found_by_reader(joined) == ["truncated_shard"]
    # reading goes on from behind any sample
    whole = list(read_runs(io.BytesIO(content), 0, LIMITS))
    for number, run in enumerate(whole):
        rest = read_runs(io.BytesIO(content), run.end, LIMITS)
        assert [r.key for r in rest] == keys[number + 1 :]


def test_files_of_a_sample_that_are_apart_are_called_so(tmp_path):
    path = tmp_path / "000.tar"
    pictures = b"".join(member(f"{n}.jpg", PICTURE) for n in range(20))
    texts = b"".join(member(f"{n}.txt", b"words") for n in range(20))
    for first, second, cause in (
        (pictures, texts, "missing_caption"),
        (texts, pictures, "missing_image"),
    ):
        path.write_bytes(first + second + END)
        assert Counter(found_by_reader(path)) == {cause: 20, "files_not_adjacent": 20}
        assert "tar --sort=name" in inspect_shards([str(path)]).text()
        with pytest.raises(DataError, match=r"files_not_adjacent.*; .*tar --sort=name"):
            next(iter(loader(str(path), 0, 1, lanes=1)))
    path.write_bytes(member("a.jpg", PICTURE) + member("b.txt", b"words") + END)
    assert found_by_reader(path) == ["missing_caption", "missing_image"]
    path.write_bytes(pictures + texts + END)
    rules = SampleRules({}, DATA.filters, captions_needed=False)  # as `caption` reads
    seen = list(read_shard(str(path), rules, StorageOptions(0)))
    assert all(isinstance(entry, RawSample) for entry in seen[:20])
    assert [entry.cause for entry in seen[20:]] == ["files_not_adjacent"] * 20


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_compressed_tars_say_what_to_do(tmp_path, name):
    path = tmp_path / name
    write_shards(tmp_path, [40])
    content = (tmp_path / "000.tar").read_bytes()
    path.write_bytes(gzip.compress(content))
    source = open_source(str(path), DATA, 0)
    with pytest.raises(DataError, match=r"compressed by gzip.*'pipe:gzip -dc .*'"):
        source.check()
    assert found_by_reader(path) == ["compressed_shard"]
    assert "decompress it" in inspect_shards([str(path)]).text()
    assert len(found_by_reader(f"pipe:gzip -dc {path}")) == 40
    path.write_bytes(gzip.compress(content)[:100])  # shorter than a header
    assert found_by_reader(path) == ["compressed_shard"]


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    assert found_by_reader(tmp_path / "x.tar") == ["unreadable_shard"]
    (tmp_path / "y.tar").mkdir()
    assert found_by_reader(tmp_path / "y.tar") == ["unreadable_shard"]
