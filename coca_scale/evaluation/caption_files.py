"""JSONL files of captions that grow until they are complete, whatever ends the program meanwhile.

A rank appends what it has written to `OUT.part-RANK-of-RANKS`, with the place of every picture. A
later call, on any number of ranks, leaves out whatever is in such a file, so every picture is
captioned once. When all ranks are through, the parts become OUT, in the order of the inputs.
Side-cars of shards are written whole, one file per shard.
"""

from __future__ import annotations

import heapq
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, NonNegativeInt

from coca_scale.data.sample import DataError
from coca_scale.errors import UserError
from coca_scale.evaluation.captioning import Captioned
from coca_scale.evaluation.pictures import Part, Place
from coca_scale.recipe.files import json_lines, read_json, validated
from coca_scale.recipe.whole_files import NamedFile, whole_file, write_whole

SETTINGS = "settings.json"
_PART, _NUMBER = "part", "number"
# of names of files that are no UTF-8 JSON's own escapes, which are read as the same names
_TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}


class _Written(BaseModel, extra="allow"):
    """A line of a part: a record, and the place of its picture."""

    part: NonNegativeInt
    number: NonNegativeInt
    key: str
    caption: str
    score: float

    @property
    def place(self) -> Place:
        return Place(self.part, self.number)

    def record(self) -> dict[str, Any]:
        return self.model_dump(exclude={_PART, _NUMBER})


class CaptionFile:
    """One rank's share of a JSONL file."""

    def __init__(self, out: Path, rank: int, ranks: int, settings: Mapping[str, Any]) -> None:
        """Go on where an interrupted call stopped.

        Raises:
            DataError: it was begun with other settings.
        """
        self._out = out
        self._settings = json.loads(json.dumps(settings))
        out.parent.mkdir(parents=True, exist_ok=True)
        self._mine = out.with_name(f"{out.name}.part-{rank}-of-{ranks}")
        self.done = frozenset(self._read_done())
        _drop_torn_line(self._mine)
        raw = NamedFile(str(self._mine), "a")
        self._file = io.TextIOWrapper(io.BufferedWriter(raw), **_TEXT)
        if not os.fstat(raw.fileno()).st_size:
            self._file.write(json.dumps({"settings": self._settings}) + "\n")
            self._file.flush()

    def add(self, captioned: Iterable[Captioned]) -> None:
        """Append captions; afterwards they are in the file."""
        lines = []
        for item in captioned:
            place = {_PART: item.picture.place.part, _NUMBER: item.picture.place.number}
            lines.append(_line(place | _record(item)))
        self._file.write("".join(lines))
        self._file.flush()

    def close(self) -> None:
        """Write to disk what the system still holds."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def discard(self) -> None:
        """Remove a closed file in which no captions are."""
        self._mine.unlink()

    def merge(self) -> None:
        """Make one file of the parts of all ranks, which have closed them.

        Raises:
            DataError: there are none.
        """
        parts = self._parts()
        if not parts:
            raise DataError(f"{self._out}: its parts have been removed; it is left as it is")
        ordered = heapq.merge(*(_sorted(path) for path in parts), key=lambda item: item[0])
        _write_records(self._out, (record for _, record in ordered))
        for path in parts:
            path.unlink()

    def _parts(self) -> list[Path]:
        return sorted(self._out.parent.glob(f"{_escaped(self._out.name)}.part-*-of-*"))

    def _read_done(self) -> Iterator[Place]:
        for path in self._parts():
            first = next(json_lines(path), None)
            if first is not None and first.get("settings") != self._settings:
                raise DataError(
                    f"{path} was begun with another model, other inputs or options; finish it with "
                    "those, write to another file, or delete it"
                )
            yield from (written.place for written in _written(path))


class SideCars:
    """A folder with a JSONL file for every shard."""

    def __init__(self, folder: Path, parts: Sequence[Part]) -> None:
        """Raises DataError for inputs that are no shards; nothing is written yet."""
        others = [part.name for part in parts if not part.is_shard]
        if others:
            raise DataError(f"{others[0]}: side-cars are of shards; name a .jsonl file as --out")
        self._paths = [folder / f"{_stem(part.name)}.jsonl" for part in parts]
        if len(set(self._paths)) < len(parts):
            raise DataError("two shards have the same name; caption them into separate folders")
        self._folder = folder

    def settle(self, settings: Mapping[str, Any]) -> None:
        """Write down how the captions are made, or see that it is as in an earlier call.

        Raises:
            DataError: it is a folder of something else.
        """
        folder = self._folder
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / SETTINGS
        content = json.dumps(settings, indent=1) + "\n"
        if not known.is_file():
            write_whole(known, content)
        elif read_json(known) != json.loads(content):
            raise DataError(
                f"{folder} holds captions of another model or other options; see {known}, and "
                "choose another folder"
            )

    def is_done(self, part: int) -> bool:
        """Whether the side-car of a shard is there."""
        return self._paths[part].is_file()

    def count(self, part: int) -> int:
        """Pictures in the side-car of a shard."""
        with self._paths[part].open("rb") as file:
            return sum(1 for _ in file)

    def add(self, part: int, batches: Iterable[Iterable[Captioned]]) -> None:
        """Write a side-car; it is there as a whole or not at all."""
        _write_records(self._paths[part], (_record(item) for batch in batches for item in batch))


def _write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with whole_file(path) as file:
        file.writelines(_line(record).encode(**_TEXT) for record in records)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _record(item: Captioned) -> dict[str, Any]:
    record: dict[str, Any] = {
        "key": item.picture.key,
        "caption": item.captions[0],
        "score": round(item.scores[0], 4),
    }
    if len(item.captions) > 1:
        record["captions"] = list(item.captions)
        record["scores"] = [round(score, 4) for score in item.scores]
    if item.picture.captions:
        record["references"] = list(item.picture.captions)
    return record


def _sorted(path: Path) -> list[tuple[Place, dict[str, Any]]]:
    found = [(written.place, written.record()) for written in _written(path)]
    return sorted(found, key=lambda item: item[0])


def _written(path: Path) -> Iterator[_Written]:
    """Lines of a part after its settings."""
    try:
        for number, line in enumerate(json_lines(path), 1):
            if number > 1:
                yield validated(line, _Written, f"{path}: line {number}")
    except UserError as error:
        raise DataError(
            f"{error}; delete the line, and its picture is captioned again, or the file"
        ) from error


def _drop_torn_line(path: Path) -> None:
    if path.is_file():
        whole = path.read_bytes().rpartition(b"\n")
        os.truncate(path, len(whole[0]) + len(whole[1]))


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _stem(url: str) -> str:
    return Path(url.rpartition("/")[2]).stem
