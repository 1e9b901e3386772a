"""Saves that lie in the memory or on the disks of the nodes, and what can be had of one of them.

A node has a folder `HOST/step_N` with the files of its own ranks and of those whose partner it is.
Its manifest lists the files of all ranks, so that what is missing is known. A folder with a
manifest was complete on its node; the save is whole if each file is on one node or another.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO

from coca_scale.engine.checkpoint import (
    MANIFEST,
    Manifest,
    begin_folder,
    complete_folder,
    find_checkpoint,
    newest_first,
    step_name,
    step_of,
)
from coca_scale.engine.world import World
from coca_scale.engine.writing import Entries, copy_into, sync_folder, write_hashed
from coca_scale.errors import UserError
from coca_scale.recipe.files import read_json_as, sha256_of
from coca_scale.recipe.run_folder import LOCAL_ID
from coca_scale.recipe.whole_files import write_whole

_Save = tuple[int, str]  # step, and digest of its manifest: a step may have been run twice


class _NodeManifest(Manifest):
    """What was saved, and by which nodes."""

    hosts: list[str]


def name_on_nodes(checkpoints: Path) -> str:
    """Of the folder in which a node has the local saves of a run.

    Once the folder of checkpoints is a new one, or a copy, that is another name.

    Args:
        checkpoints: of the run.

    Raises:
        OSError: that cannot be written.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    file = checkpoints / LOCAL_ID
    if not file.is_file():
        write_whole(file, secrets.token_hex(16) + "\n")
    about = f"{file.read_text()}{checkpoints.resolve()}"
    return f"coca-scale-{hashlib.sha256(about.encode()).hexdigest()[:16]}"


def make_own(folder: Path) -> None:
    """Make a folder that nobody else can look into.

    Raises:
        UserError: somebody has made it before.
        OSError: it cannot be made.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError(f"{folder} is not a folder of this user alone; remove it")


def complete_here(temporary: Path, final: Path, files: Entries, hosts: list[str]) -> None:
    """Give a node's part of a save its name.

    Args:
        temporary: where it was written.
        final: where it is to be.
        files: of all nodes.
        hosts: all nodes.

    Raises:
        OSError: of the disk.
    """
    content = json.dumps({"files": dict(sorted(files.items())), "hosts": hosts}).encode()
    write_hashed(temporary / MANIFEST, lambda file: file.write(content))
    temporary.rename(final)
    sync_folder(final.parent)


def drop_below(folder: Path, step: int) -> None:
    """Remove a node's saves of earlier steps."""
    for name in newest_first(path.name for path in folder.glob("step_*")):
        if step_of(name) < step:
            shutil.rmtree(folder / name, ignore_errors=True)


def rescue(folder: Path, checkpoints: Path, world: World) -> str | None:
    """Make a checkpoint of the newest save on the nodes that is whole. A collective.

    Args:
        folder: on this node, of all saves of the run.
        checkpoints: of the run; one there that is as new is better.
        world: the ranks.

    Returns:
        What was done, None if there was nothing to do.

    Raises:
        AgreedError: the checkpoint cannot be written.
    """
    newest = world.on_first(lambda: find_checkpoint(checkpoints))
    here = world.agree(lambda: _saves_in(folder))
    offers = world.gather(list(here))
    for save in sorted({save for offer in offers for save in offer}, reverse=True):
        final = checkpoints / step_name(save[0])
        if newest is not None and final.name <= newest.name:
            break
        parts = here.get(save, [])
        first = next(rank for rank, offer in enumerate(offers) if save in offer)
        mine = _read(parts[0] / MANIFEST) if world.rank == first else None
        manifest = world.gather(mine)[first]
        if manifest is not None and _put_together(manifest, parts, final, world):
            there = world.gather([part.parent.name for part in parts])
            return _told(final.name, manifest.hosts, {host for names in there for host in names})
    return None


def _saves_in(folder: Path) -> dict[_Save, list[Path]]:
    """Complete saves on this node; several folders of one where nodes share a disk."""
    found: dict[_Save, list[Path]] = {}
    for manifest in sorted(folder.glob(f"*/step_*/{MANIFEST}")):
        for name in newest_first([manifest.parent.name]) if _read(manifest) is not None else ():
            found.setdefault((step_of(name), sha256_of(manifest)), []).append(manifest.parent)
    return found


def _read(manifest: Path) -> _NodeManifest | None:
    """None where it is damaged: other nodes have it, too."""
    try:
        return read_json_as(manifest, _NodeManifest)
    except (UserError, OSError):
        return None


def _put_together(manifest: _NodeManifest, parts: list[Path], final: Path, world: World) -> bool:
    """Copy each file from a node that has it; whether all of them were to be had. A collective."""
    missing, damaged = sorted(manifest.files), set[Path]()
    temporary: Path | None = None
    while missing:
        here = _sources(manifest, missing, parts, damaged)
        offers = world.gather(set(here))
        holders = {name: [r for r, names in enumerate(offers) if name in names] for name in missing}
        if not all(holders.values()):
            if temporary is not None:
                world.on_first(partial(shutil.rmtree, temporary, ignore_errors=True))
            return False
        target = temporary = temporary or world.on_first(partial(begin_folder, final))
        turns = [(name, holders[name][n % len(holders[name])]) for n, name in enumerate(missing)]
        share = [name for name, rank in turns if rank == world.rank]
        bad = world.agree(partial(_copy_all, manifest, here, share, target))
        damaged |= {here[name] for name in bad}
        missing = sorted(name for names in world.gather(bad) for name in names)
    assert temporary is not None, "a save without files"
    files = {name: entry.model_dump() for name, entry in manifest.files.items()}
    world.on_first(partial(complete_folder, temporary, final, files))
    return True


def _sources(
    manifest: _NodeManifest, names: list[str], parts: list[Path], damaged: set[Path]
) -> dict[str, Path]:
    """Where this node has files that seem to be whole."""
    found: dict[str, Path] = {}
    for name, path in ((name, part / name) for part in parts for name in names):
        size = path.stat().st_size if path.is_file() else None
        if size == manifest.files[name].bytes and path not in damaged:
            found.setdefault(name, path)
    return found


def _copy_all(
    manifest: _NodeManifest, sources: dict[str, Path], names: list[str], target: Path
) -> list[str]:
    """Copy files of this node; names of those that are not what was saved.

    Raises:
        OSError: of the disk that is written.
    """
    written = {n: write_hashed(target / n, partial(_copy, sources[n])) for n in names}
    return [n for n, entry in written.items() if entry != manifest.files[n].model_dump()]


def _copy(source: Path, file: IO[bytes]) -> None:
    with suppress(OSError):  # what cannot be read is not what was saved
        copy_into(file, source)


def _told(name: str, hosts: list[str], found: set[str]) -> str:
    lost = [host for host in hosts if host not in found]
    there = ", ".join(host for host in hosts if host in found)
    note = f"rescued {name} from local saves on {there}"
    return f"{note}; files of {', '.join(lost)} came from partners" if lost else note
