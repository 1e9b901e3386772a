"""Saves on nodes: copies of each node's files are on the next, and one is made of what is left."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future
from dataclasses import dataclass, replace

import pytest

from coca_scale.engine import partners
from coca_scale.engine.checkpoint import MANIFEST, find_checkpoint, verify_checkpoint
from coca_scale.engine.node_saves import complete_here, drop_below, make_own, name_on_nodes, rescue
from coca_scale.engine.writing import FileWriter, write_hashed
from coca_scale.errors import UserError
from tests.ranks import on_ranks

HOSTS = ("n1", "n1", "n2", "n2", "n3")
PROGRESS = {
    "step": 10,
    "samples_seen": 0,
    "bad_steps": {"skipped": 0, "spikes": 0, "spread": [0, 0.0, 0.0]},
    "skips": {"bad": 0, "filtered": 0, "causes": {}, "listed": 0},
    "lanes": [[0]],
    "model_cfg": {},
}


def world_of(hosts):
    from coca_scale.engine.launch import start_world

    return replace(start_world(60), hosts=hosts)


def content_of(step, rank):
    """Files of a rank: empty, of whole pieces, and more."""
    made = {f"state/{rank}.pt": bytes([step, rank]) * 21, f"state/{rank}.empty": b""}
    if rank == 0:
        made |= {"progress.json": json.dumps(PROGRESS).encode(), "logit_scale.pt": b"0123456"}
    return made


def save(world, exchanging, nodes, step):
    """As a run does; the folder of this rank's node."""
    host = world.hosts[world.rank]
    final = nodes / host / "run" / host / f"step_{step:08d}"
    temporary = final.with_suffix(".begun")
    temporary.mkdir(parents=True, exist_ok=True)
    writer = FileWriter(lambda: 0)
    for name, content in content_of(step, world.rank).items():
        writer.add(temporary / name, lambda file, content=content: file.write(content))
    mine = exchanging.exchange(temporary, writer.start(temporary)).result()
    files = {name: entry for part in world.gather(mine) for name, entry in part.items()}
    if world.hosts.index(host) == world.rank:
        complete_here(temporary, final, files, ["n1", "n2", "n3"])
    world.barrier()


@dataclass(frozen=True)
class Case:
    """What has happened to the nodes since, and what is left.

    Attributes:
        lost: nodes without what they had.
        damaged: files of step 20, by node and name, with other content.
        begun: nodes that had not given the save of step 20 its name.
        checkpoint: step of one in the run folder.
        told: the note; None if nothing can be had.
    """

    told: str | None
    lost: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    begun: tuple[str, ...] = ()
    checkpoint: int | None = None

    def make(self, nodes, folder):
        shutil.copytree(nodes, folder)
        for host in self.lost:
            shutil.rmtree(folder / host)
        for name in self.damaged:
            host, _, file = name.partition("/")
            path = folder / host / "run" / host / "step_00000020" / file
            path.write_bytes(bytes(path.stat().st_size))
        for host in self.begun:
            (folder / host / "run" / host / "step_00000020" / MANIFEST).unlink()
        if self.checkpoint is not None:
            there = folder / "checkpoints" / f"step_{self.checkpoint:08d}"
            there.mkdir(parents=True)
            (there / MANIFEST).touch()


NEWEST = "rescued step_00000020 from local saves on"
OLDER = "rescued step_00000010 from local saves on"
CASES = [
    Case(f"{NEWEST} n1, n2, n3"),
    Case(f"{NEWEST} n1, n3; files of n2 came from partners", lost=("n2",)),
    Case(f"{NEWEST} n2, n3; files of n1 came from partners", lost=("n1",)),
    Case(None, lost=("n1", "n2")),
    Case(f"{NEWEST} n1, n2, n3", damaged=("n2/state/3.pt", "n1/progress.json")),
    Case(f"{OLDER} n1, n2, n3", damaged=("n2/state/3.pt", "n3/state/3.pt")),
    Case(f"{OLDER} n1, n3; files of n2 came from partners", ("n2",), ("n3/state/3.pt",)),
    Case(f"{NEWEST} n1, n2; files of n3 came from partners", damaged=("n3/manifest.json",)),
    Case(f"{NEWEST} n1, n2; files of n3 came from partners", begun=("n3",)),
    Case(f"{OLDER} n1, n2, n3", begun=("n2", "n3")),
    Case(f"{NEWEST} n1, n2, n3", checkpoint=15),
    Case(None, checkpoint=20),
]


def on_nodes(rank, ranks, folder):
    """Two saves of five ranks on three nodes; what is rescued in each of the cases."""
    partners.PIECE_BYTES = 7
    world = world_of(HOSTS)
    exchanging = partners.Partners(world, 60)
    for step in (10, 20):
        save(world, exchanging, folder / "nodes", step)
    exchanging.close()
    notes = []
    for number, case in enumerate(CASES):
        place = folder / str(number)
        if rank == 0:
            case.make(folder / "nodes", place)
        world.barrier()
        notes.append(rescue(place / HOSTS[rank] / "run", place / "checkpoints", world))
    return notes


@pytest.mark.slow
def test_a_save_is_whole_as_long_as_each_file_is_on_some_node(tmp_path):
    results = on_ranks(on_nodes, 5, tmp_path)
    on_n3 = tmp_path / "nodes" / "n3" / "run" / "n3" / "step_00000020"
    held = {p.name for p in (on_n3 / "state").iterdir()}
    assert held == {f"{rank}.{kind}" for rank in (2, 3, 4) for kind in ("pt", "empty")}
    for number, case in enumerate(CASES):
        assert {notes[number] for notes in results} == {case.told}, case
        checkpoints = tmp_path / str(number) / "checkpoints"
        if case.told is None:
            assert case.checkpoint is not None or not list(checkpoints.glob("*"))
            continue
        found = find_checkpoint(checkpoints)
        assert found is not None and found.name in case.told
        verify_checkpoint(found)
        step = int(found.name[-2:])
        expected = {n: c for rank in range(5) for n, c in content_of(step, rank).items()}
        assert {n: (found / n).read_bytes() for n in expected} == expected
        left = {p.name for p in checkpoints.iterdir()} - {"step_00000015"}
        assert left == {found.name, "latest"}


def with_faults(rank, ranks, folder):
    """What each rank's exchange comes to where rank 0's disk is full, and rank 1's folder gone."""
    world = world_of(("n1", "n2", "n3"))
    exchanging = partners.Partners(world, 60)
    mine = folder / str(rank)
    if rank != 1:
        mine.mkdir()
    content, own = b"x" * 99, Future()
    if rank == 0:
        own.set_exception(OSError(28, "No space left on device"))
    else:
        source = folder / f"{rank}.source"
        entry = write_hashed(source, lambda file: file.write(content))
        if rank == 2:
            (mine / "2.pt").write_bytes(content)
        own.set_result({f"{rank}.pt": entry})  # rank 1's is not to be had any more
    results = []
    for _ in range(2):  # one fault does not spoil the next save
        error = exchanging.exchange(mine, own).exception()
        results.append((type(error).__name__, str(error)))
    exchanging.close()
    return results, sorted(p.name for p in mine.iterdir()) if mine.is_dir() else None


@pytest.mark.slow
def test_who_cannot_write_or_read_leaves_nobody_waiting(tmp_path):
    full, gone, other = on_ranks(with_faults, 3, tmp_path)
    assert [str(error) for _, error in full[0]] == ["[Errno 28] No space left on device"] * 2
    assert full[1] == ["2.pt"]  # what it keeps for another is there all the same
    assert [kind for kind, _ in gone[0]] == ["NoneType"] * 2 and gone[1] is None
    told = "the copy of 1.pt from rank 1 has another checksum"
    assert [error for _, error in other[0]] == [told] * 2


def test_partners_are_on_the_next_node():
    assert partners.keepers(["a", "a", "b", "b"]) == [2, 3, 0, 1]
    assert partners.keepers(["a", "b", "a", "b", "c"]) == [1, 4, 3, 4, 0]
    assert partners.keepers(["a", "a"]) is None


def test_a_new_folder_of_checkpoints_has_other_saves_on_the_nodes(tmp_path):
    first = name_on_nodes(tmp_path / "checkpoints")
    assert name_on_nodes(tmp_path / "checkpoints") == first
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "copy")
    assert name_on_nodes(tmp_path / "copy") != first
    shutil.rmtree(tmp_path / "checkpoints")
    assert name_on_nodes(tmp_path / "checkpoints") != first


def test_a_folder_that_others_can_see_is_not_used(tmp_path):
    make_own(tmp_path / "own")
    make_own(tmp_path / "own")
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(tmp_path / "own")
    for name in ("open", "link"):
        with pytest.raises(UserError, match="is not a folder of this user alone"):
            make_own(tmp_path / name)


def test_only_saves_of_earlier_steps_are_dropped(tmp_path):
    for name in ("step_00000010", "step_00000020", "step_00000010.begun"):
        (tmp_path / name / "state").mkdir(parents=True)
    drop_below(tmp_path, 20)
    assert {p.name for p in tmp_path.iterdir()} == {"step_00000020", "step_00000010.begun"}
