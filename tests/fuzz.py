"""Files as nobody wrote them: mutated bytes and structure of small real ones, by a number each.

An input follows from the name of its reader and its number, so any that escapes can be made again.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import random
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from coca_scale.data.sample import BadSample
from coca_scale.data.tar import TarFault
from coca_scale.errors import UserError

UNDERSTOOD = (BadSample, TarFault, UserError)
MOST_SECONDS = 20.0  # of processor time for one input
MOST_BYTES = 3 * 2**29  # that the process may grow by: a picture of 2^27 pixels takes 2^30
HANGS_SECONDS = 300.0  # for GROUP inputs
GROUP = 100
MOST_FOUND = 20
NUMBERS = (
    *(b"0", b"-1", b"0.5", b"1e300", b"-1e-300", b"NaN", b"Infinity", b"010", b"1_0", b"1:30"),
    *(b"2147483648", b"9223372036854775808", b"9" * 25, b"9" * 5000, "٣".encode()),
)
WORDS = (0, 1, 2, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
TOKENS = (
    *(b"null", b"true", b"[]", b"{}", b'""', b'"', b"'", b",", b":", b"\t", b"\n", b"\r", b"\0"),
    *(b'"\\ud800"', b"\\", b"\x1b[31m", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xe9"),
    *(b"../", b"&a [*a]", b"<<: *a", b"!!python/object/apply:os.abort []", b"? ", b"- ", b"#"),
    *(b"[" * 20000, b"{'a':" * 5000, b"\xe2\x80\xa8", b"\xc2\xa0", b" " * 100),
)
NODES = (
    *(None, True, False, 0, -1, 1.5, 1e300, float("nan"), 2**63, 10**25, "", "\ud800", "\0\x1b["),
    *("x" * 10_000, [], {}, [None], {"": None}, [[]] * 100, "../../x", "1", [1, "a", {}]),
)


@dataclass(frozen=True)
class Reader:
    """What reads files that others wrote.

    Attributes:
        seeds: makes small real files.
        read: reads the file at a path; what it may raise is UNDERSTOOD.
        file: how the file is called.
        mend: makes checksums right again, so that what lies behind them is reached.
        is_json: also change the structure.
    """

    seeds: Callable[[], Sequence[bytes]]
    read: Callable[[Path], object]
    file: str
    mend: Callable[[bytearray], None] = lambda _: None
    is_json: bool = False


def escapes(reader: Reader, name: str, inputs: int, folder: Path) -> list[str]:
    """What came out of `inputs` inputs beside UNDERSTOOD, or ended the process; [] if nothing."""
    found = folder / "escapes.txt"
    found.touch()
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_work, args=(reader, name, inputs, folder, found))
    child.start()
    child.join()
    lines = found.read_text().splitlines()
    if child.exitcode != 0:
        lines.append(f"{name}: the process ended with {child.exitcode} at {folder / reader.file}")
    return lines


def mutated(seeds: Sequence[bytes], reader: Reader, rng: random.Random) -> bytes:
    """A seed with a few changes, of which the checksums may know."""
    data = bytearray(rng.choice(seeds))
    if reader.is_json and rng.random() < 0.5:
        return _other_structure(bytes(data), rng)
    for _ in range(1 + int(rng.expovariate(0.7))):
        rng.choice(_CHANGES)(data, rng, seeds)
    if rng.random() < 0.7:
        reader.mend(data)
    return bytes(data)


def _work(reader: Reader, name: str, inputs: int, folder: Path, found: Path) -> None:
    seeds = reader.seeds()
    path = folder / reader.file
    for seed in seeds:  # also warms up what is imported late
        path.write_bytes(seed)
        assert _fault_of(reader, path) is None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = 0
    with found.open("a") as lines:
        for number in range(inputs):
            if number % GROUP == 0:
                faulthandler.dump_traceback_later(HANGS_SECONDS, exit=True)
            path.write_bytes(mutated(seeds, reader, random.Random(f"{name} {number}")))
            fault = _fault_of(reader, path)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            if fault is None and grown > MOST_BYTES:
                fault = f"took {grown / 2**20:.0f} MiB"
                before += grown // 1024
            if fault is not None:
                lines.write(f"{name} {number}: {fault}\n")
                lines.flush()
                count += 1
                if count == MOST_FOUND:
                    break
    faulthandler.cancel_dump_traceback_later()


def _fault_of(reader: Reader, path: Path) -> str | None:
    start = time.process_time()
    try:
        reader.read(path)
    except UNDERSTOOD as error:
        if not str(error).strip():
            return f"{type(error).__name__} without a word"
    except BaseException as error:  # noqa: BLE001 (whatever it is)
        return f"{type(error).__name__}: {str(error)[:200]}".replace("\n", " ")
    taken = time.process_time() - start
    return f"took {taken:.0f} s" if taken > MOST_SECONDS else None


def _flip(data: bytearray, rng: random.Random, seeds: Sequence[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))


def _cut(data: bytearray, rng: random.Random, seeds: Sequence[bytes]) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _drop(data: bytearray, rng: random.Random, seeds: Sequence[bytes]) -> None:
    first = rng.randrange(len(data) + 1)
    del data[first : first + rng.choice((1, 2, 4, 16, 512, len(data)))]


def _repeat(data: bytearray, rng: random.Random, seeds: Sequence[bytes]) -> None:
    first = rng.randrange(len(data) + 1)
    piece = data[first : first + rng.choice((1, 8, 64, 512, 1024))]
    data[first:first] = piece * rng.choice((1, 2, 10, 50))


def _splice(data: bytearray, rng: random.Random, seeds: Sequence[bytes]) -> None:
    other = rng.choice(seeds)
    data[rng.randrange(len(data) + 1) :] = other[rng.randrange(len(other) + 1) :]


def _number(data: bytearray, rng: random.Random, seeds: Sequence[bytes]) -> None:
    digits = [i for i, byte in enumerate(data[:4096]) if 48 <= byte < 58]
    if digits:
        place = rng.choice(digits)
        data[place : place + rng.choice((1, 1, 4))] = rng.choice(NUMBERS)


def _word(data: bytearray, rng: random.Random, seeds: Sequence[bytes]) -> None:
    size = rng.choice((1, 2, 4, 8))
    value = rng.choice(WORDS) % 2 ** (8 * size)
    place = rng.randrange(min(len(data), rng.choice((64, 600, 4096))) + 1)
    data[place : place + size] = value.to_bytes(size, rng.choice(("big", "little")))


def _token(data: bytearray, rng: random.Random, seeds: Sequence[bytes]) -> None:
    place = rng.randrange(len(data) + 1)
    data[place : place + rng.choice((0, 0, 1, 4))] = rng.choice(TOKENS)


_CHANGES = (_flip, _flip, _cut, _drop, _repeat, _splice, _number, _word, _word, _token)


def _other_structure(data: bytes, rng: random.Random) -> bytes:
    content = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        content = _changed(content, rng)
    if rng.random() < 0.01:
        deep = b"[" * 100_000 + b"]" * 100_000
        return json.dumps([content, None]).encode().replace(b"null", deep, 1)
    return json.dumps(content, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def _changed(node: object, rng: random.Random) -> object:
    """A copy with another value, name or number of entries somewhere in it."""
    if not node or not isinstance(node, dict | list) or rng.random() < 0.15:
        return rng.choice(NODES)
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    key = rng.choice(keys)
    copy = node.copy()
    change = rng.random()
    if change < 0.1:
        del copy[key]  # type: ignore[arg-type]
    elif change < 0.2 and isinstance(copy, dict):
        copy[rng.choice(("", "x", "size", str(key) + " "))] = copy.pop(key)
    elif change < 0.3 and isinstance(copy, list):
        copy *= 2
    else:
        copy[key] = _changed(copy[key], rng)  # type: ignore[index]
    return copy
