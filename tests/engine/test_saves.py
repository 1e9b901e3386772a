"""A save writes the same files whether or not there was memory for a copy of the state."""

from __future__ import annotations

import threading

import pytest
import torch

from coca_scale.engine.host import available_bytes, memory_bytes, regrowth_bytes
from coca_scale.engine.writing import PIECE_BYTES, FileWriter
from tests.conftest import tiny_recipe
from tests.engine.batches import BATCH, batch_of
from tests.ranks import on_ranks, quiet

LAYOUTS = [(3, "fp32"), (3, "bf16"), (2, "bf16"), (0, "fp32")]


def save_both_ways(rank, ranks, folder):
    from coca_scale.engine.launch import start_world
    from coca_scale.engine.train_engine import TrainEngine
    from coca_scale.model import CoCa, LogitScale, load_model_config
    from coca_scale.recipe import BatchSplit

    world, written = start_world(60), {}
    for stage, precision in LAYOUTS:
        for background in (True, False):
            recipe = tiny_recipe(
                engine__zero_stage=stage,
                engine__precision=precision,
                train__global_batch=BATCH,
                train__micro_batch=BATCH // ranks,
                checkpoint__background=background,
                optim__ema_decay=0.9 if stage else None,
            )
            split = BatchSplit.from_recipe(recipe, ranks)
            with quiet():
                torch.manual_seed(0)
                model = CoCa(load_model_config("coca_tiny"))
                engine = TrainEngine(model, LogitScale(), recipe, split, world)
                here = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
                for step in range(2):
                    images, tokens = batch_of(step)
                    engine.step(images[here], engine.lay_out(tokens[here]), 1e-3)
                saving = engine.save_state(folder / f"{stage}_{precision}_{background}")
                at_once = saving.done()
                written[stage, precision, background] = at_once, saving.result()
                engine.close()
    return written


@pytest.mark.slow
def test_a_save_without_a_copy_is_the_same_to_the_byte(tmp_path):
    for written in on_ranks(save_both_ways, 2, tmp_path):
        for stage, precision in LAYOUTS:
            _, copied = written[stage, precision, True]
            at_once, kept = written[stage, precision, False]
            assert at_once, "training would have gone on before all was written"
            assert copied or stage == 0  # where rank 0 writes everything
            assert {n: e["sha256"] for n, e in kept.items()} == {
                n: e["sha256"] for n, e in copied.items()
            }


@pytest.mark.parametrize("room", [0, 10 * PIECE_BYTES])
def test_what_there_is_no_room_to_copy_is_written_before_training_goes_on(room, tmp_path):
    large, small = torch.zeros(PIECE_BYTES), torch.zeros(8)
    view = torch.zeros(100, PIECE_BYTES)[0]  # a file of it as it is would be a hundred times larger
    writer = FileWriter(lambda: room)
    writer.save({"large": large, "small": small, "view": view}, tmp_path / "state.pt")
    if room:
        large += 1  # training goes on
    small += 1
    writing = writer.start(tmp_path)
    assert writing.done() or room
    assert writing.result()["state.pt"]["bytes"] < 3 * large.nbytes
    saved = torch.load(tmp_path / "state.pt")
    assert all(saved[name].eq(0).all() for name in ("large", "small", "view"))


def test_a_save_that_waits_for_its_disk_holds_up_no_other(tmp_path):
    slow, fast = tmp_path / "shared", tmp_path / "node"
    arrived = threading.Event()
    writer = FileWriter(lambda: 0)
    for folder in (slow, fast):
        folder.mkdir()
    writer.add(slow / "file", lambda file: arrived.wait(60) and file.write(b"slow"))
    waiting = writer.start(slow)
    writer.add(fast / "file", lambda file: file.write(b"fast"))
    assert writer.start(fast).result(60)["file"]["bytes"] == 4
    assert not waiting.done()
    arrived.set()
    assert waiting.result(60)["file"]["bytes"] == 4


def test_memory_of_a_job_is_what_its_control_groups_leave(tmp_path):
    from coca_scale.engine.host import _limits

    own = tmp_path / "cgroup"
    for version, line, names in [
        ("v2", "0::/job/step", ("memory.max", "memory.current", "inactive_file")),
        (
            "v1/memory",
            "4:memory:/job/step",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ]:
        root = tmp_path / version
        for path, limit in (("job", "8000"), ("job/step", "max")):
            folder = root / path
            folder.mkdir(parents=True)
            (folder / names[0]).write_text(f"{limit}\n")
            (folder / names[1]).write_text("5000\n")
            (folder / "memory.stat").write_text(f"cache 7\n{names[2]} 1000\n")
        own.write_text(f"9:name=systemd:/\n{line}\n")
        mount = root.parent if version.startswith("v1") else root
        assert list(_limits(mount, own)) == [(8000, 4000)]
    assert 0 < available_bytes() < memory_bytes()


def big_and_gone(_rank, _ranks):
    before = regrowth_bytes()
    block = torch.ones(50_000_000)
    there = regrowth_bytes()
    del block
    return before, there, regrowth_bytes()


def test_what_a_process_gave_back_is_kept_for_it():
    ((before, there, after),) = on_ranks(big_and_gone, 1)
    assert there < 1.9e8 < after - there
    assert before < 1.9e8
