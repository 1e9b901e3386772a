"""What of a run lies in its mirror: laid out as the run folder, complete or absent as there.

A checkpoint is one while its manifest is there, which comes last and goes first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from coca_scale.data.bucket import Bucket
from coca_scale.data.retries import StorageError
from coca_scale.data.tokens import TOKENIZER_CONFIG, TOKENIZER_FILE
from coca_scale.engine.checkpoint import MANIFEST, listed_files, newest_first, surplus
from coca_scale.engine.writing import Entries, write_hashed
from coca_scale.errors import UserError
from coca_scale.openclip.folder import CONFIG_FILE, OWN_CONFIG_FILE
from coca_scale.recipe.run_folder import (
    BAD_SAMPLES,
    BAD_STEPS,
    CHECKPOINTS,
    EVENTS,
    EXPORT,
    LATEST,
    METRICS,
    RECIPE,
    VALIDATION,
    VERSIONS,
)
from coca_scale.recipe.whole_files import write_whole

LINES = (METRICS, EVENTS, VALIDATION, BAD_SAMPLES, BAD_STEPS)
LOGS = (RECIPE, VERSIONS, TOKENIZER_FILE, TOKENIZER_CONFIG, *LINES)


class DamagedError(UserError):
    """A checkpoint that is not what its manifest says."""


class MirroredRun:
    """Checkpoints, logs and export of one run in a bucket. Nothing here is a collective."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._logs: dict[str, tuple[int, int]] = {}

    @property
    def url(self) -> str:
        """Where it is."""
        return self._bucket.url

    def check(self) -> None:
        """See that it can be written to.

        Raises:
            StorageError: it cannot.
        """
        self._bucket.check()

    def complete(self) -> list[str]:
        """Names of the checkpoints that have a manifest, the newest first.

        Raises:
            StorageError: the bucket cannot be listed.
        """
        found = self._bucket.sizes(CHECKPOINTS)
        return newest_first(n.removesuffix(f"/{MANIFEST}") for n in found if n.endswith(MANIFEST))

    def withdraw(self, name: str) -> None:
        """Make a checkpoint none, so that its files may change.

        Raises:
            StorageError: the bucket refuses it.
        """
        self._bucket.remove(_in(name, MANIFEST))

    def put(self, checkpoint: Path, file: str) -> None:
        """Copy a file of a checkpoint.

        Raises:
            StorageError: it cannot be written.
        """
        self._bucket.put(checkpoint / file, _in(checkpoint.name, file))

    def seal(self, checkpoint: Path) -> int:
        """Let a checkpoint be one, whose files were all put; returns their bytes.

        Raises:
            StorageError: one is not there with its size, or the bucket cannot be written.
        """
        manifest = (checkpoint / MANIFEST).read_bytes()
        there = self._bucket.sizes(f"{CHECKPOINTS}/{checkpoint.name}")
        files = listed_files(manifest, str(checkpoint))
        for file, entry in files.items():
            if there.get(file) != entry["bytes"]:
                raise StorageError(f"{self.url}: {checkpoint.name}/{file} has not arrived as it is")
        self._bucket.put(manifest, _in(checkpoint.name, MANIFEST))
        self._bucket.put(f"{checkpoint.name}\n".encode(), f"{CHECKPOINTS}/{LATEST}")
        return sum(int(entry["bytes"]) for entry in files.values())

    def drop_old(self, keep: int | None, keep_every: int | None, spared: Collection[str]) -> None:
        """Keep what `engine.checkpoint.drop_old` would, and no rests of uploads that were cut off.

        Args:
            keep: number of the newest that stay.
            keep_every: steps of which checkpoints stay.
            spared: names that are not touched, as they may be on their way.

        Raises:
            StorageError: the bucket cannot be listed, or refuses it.
        """
        files = defaultdict[str, list[str]](list)
        for path in self._bucket.sizes(CHECKPOINTS):
            name, _, file = path.partition("/")
            files[name].append(file)
        names = newest_first(files)
        complete = [name for name in names if MANIFEST in files[name]]
        newest = max(complete, default="")
        rests = [name for name in names if name < newest and name not in complete]
        for name in [*surplus(complete, keep, keep_every), *rests]:
            if name not in spared:
                self.withdraw(name)
                for file in files[name]:
                    self._bucket.remove(_in(name, file))

    def put_logs(self, folder: Path) -> None:
        """Copy what a run writes about itself, where it has changed.

        Raises:
            StorageError: it cannot be written.
            OSError: it cannot be read.
        """
        for path in (folder / name for name in LOGS):
            if path.is_file():
                about = (path.stat().st_mtime_ns, path.stat().st_size)
                if self._logs.get(path.name) != about:
                    self._bucket.put(path.read_bytes(), path.name)
                    self._logs[path.name] = about

    def put_export(self, folder: Path) -> None:
        """Copy an export, in the place of another one; its configs come last and go first.

        Raises:
            StorageError: it cannot be written.
            OSError: it cannot be read.
        """
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        configs = {CONFIG_FILE, OWN_CONFIG_FILE}
        for old in [*sorted(configs), *sorted(self._bucket.sizes(EXPORT).keys() - files)]:
            self._bucket.remove(f"{EXPORT}/{old}")
        for file in [*sorted(files - configs), *sorted(files & configs)]:
            self._bucket.put(folder / file, f"{EXPORT}/{file}")

    def files(self, name: str) -> Entries:
        """The files of a checkpoint, as its manifest has them.

        Raises:
            DamagedError: it has no manifest, or something else in its place.
            StorageError: that cannot be read.
        """
        url = f"{self.url}/{CHECKPOINTS}/{name}/{MANIFEST}"
        try:
            return listed_files(self._bucket.read(_in(name, MANIFEST)), url)
        except FileNotFoundError as error:
            raise DamagedError(f"{url} is gone") from error
        except StorageError:
            raise
        except UserError as error:
            raise DamagedError(str(error)) from error

    def get(self, name: str, file: str, entry: dict[str, Any], folder: Path) -> None:
        """Copy a file of a checkpoint into a folder.

        Raises:
            DamagedError: it is missing, or not what `entry` of the manifest says.
            StorageError: it cannot be read.
            OSError: of the disk.
        """
        pieces = self._bucket.pieces(_in(name, file))

        def fill(target: Any) -> None:
            for piece in pieces:
                target.write(piece)

        url = f"{self.url}/{CHECKPOINTS}/{name}/{file}"
        try:
            found = write_hashed(folder / file, fill)
        except FileNotFoundError as error:
            raise DamagedError(f"{url} is missing") from error
        if found != entry:
            raise DamagedError(f"{url} is damaged (its size or checksum differs)")

    def get_logs(self, folder: Path) -> None:
        """Copy logs of lines into a run folder that lacks them or has less of them.

        Raises:
            StorageError: they cannot be read.
            OSError: of the disk.
        """
        for name in LINES:
            try:
                content = self._bucket.read(name)
            except FileNotFoundError:
                continue
            path = folder / name
            if not path.is_file() or path.stat().st_size < len(content):
                write_whole(path, content)


def _in(checkpoint: str, file: str) -> str:
    return f"{CHECKPOINTS}/{checkpoint}/{file}"
