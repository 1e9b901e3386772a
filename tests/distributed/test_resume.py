"""One run over several allocations: other ranks, other ZeRO stages, damaged and missing pieces."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import tiny_recipe
from tests.json_lines import curve
from tests.ranks import on_ranks

STEPS = 12


def part_of_a_run(rank, ranks, folder, until, changes):
    """Train on from what is in `folder` and leave after step `until`; keys of every step."""
    from coca_scale.engine.launch import end_world, start_world
    from coca_scale.training.requests import Asked, Requests
    from coca_scale.training.trainer import Trainer

    recipe = tiny_recipe(
        run__dir=folder,
        train__steps=STEPS,
        train__micro_batch=4,
        optim__ema_decay=0.9,
        optim__layer_decay=0.9,
        schedule__warmup_steps=3,
        **changes,
    )
    keys: dict[int, list[str]] = {}

    class Watched(Trainer):
        def _train_step(self, batch):
            super()._train_step(batch)
            keys[self.step] = batch.share.keys

    world = start_world(60)
    trainer = Watched(recipe, world)

    def poll(self):
        return Asked(leave=trainer.step >= until)

    Requests.poll = poll
    code = trainer.run()
    notes = trainer.setup.notes
    end_world()
    return code, keys, notes


def allocate(folder, ranks, until, **changes):
    """One allocation; exit code, keys of all ranks by step, notes."""
    results = on_ranks(part_of_a_run, ranks, str(folder), until, changes)
    codes = {code for code, _, _ in results}
    assert len(codes) == 1
    keys = {step: sorted(k for _, ks, _ in results for k in ks[step]) for step in results[0][1]}
    return codes.pop(), keys, results[0][2]


def average(folder):
    from coca_scale.engine.checkpoint import find_checkpoint, read_weights

    return read_weights(find_checkpoint(Path(folder) / "checkpoints"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, keys, _ = allocate(folder, 2, STEPS)
    assert code == 0
    return folder, keys


@pytest.mark.slow
def test_other_ranks_and_stages_give_the_same_run(whole, tmp_path):
    folder = tmp_path / "run"
    seen: dict[int, list[str]] = {}
    allocations = [(2, 3, 3), (4, 2, 6), (1, 1, 9), (2, 3, STEPS)]
    for ranks, stage, until in allocations:
        code, keys, notes = allocate(folder, ranks, until, engine__zero_stage=stage)
        assert code == (0 if until == STEPS else 75)
        assert not seen.keys() & keys.keys()
        assert until == 3 or any("into another layout" in note for note in notes)
        seen |= keys
    assert seen == whole[1]
    for changed, expected in zip(curve(folder, STEPS), curve(whole[0], STEPS), strict=True):
        assert changed == pytest.approx(expected, rel=1e-3)
    for name, value in average(whole[0]).items():
        assert average(folder)[name].allclose(value, rtol=1e-3, atol=1e-4), name


@pytest.mark.slow
def test_weights_are_as_deepspeed_puts_them_together(whole):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from coca_scale.engine.checkpoint import find_checkpoint, read_weights

    checkpoint = find_checkpoint(whole[0] / "checkpoints")
    for folder, raw in ((checkpoint, True), (checkpoint / "average", False)):
        ours = read_weights(checkpoint, raw=raw)
        theirs = get_fp32_state_dict_from_zero_checkpoint(str(folder), "state")
        assert theirs.keys() == ours.keys() - {"logit_scale.log_scale"}
        assert all(ours[name].equal(value) for name, value in theirs.items())


TWO = {
    "data__contrastive_captions": {"txt": 0.5, "long:sentences": 0.5},
    "data__caption_captions": {"long": 1.0},
    "loss__caption_parallel": 0.3,
}


@pytest.mark.slow
def test_two_captions_go_on_as_one_does(tmp_path):
    whole, again, fewer = (tmp_path / name for name in ("whole", "again", "fewer"))
    keys = allocate(whole, 2, STEPS, **TWO)[1]
    for folder, ranks in ((again, 2), (fewer, 1)):
        first = allocate(folder, 2, 5, **TWO)[1]
        rest = allocate(folder, ranks, STEPS, **TWO)[1]
        assert first | rest == keys
    assert curve(again, STEPS) == curve(whole, STEPS)
    for changed, expected in zip(curve(fewer, STEPS), curve(whole, STEPS), strict=True):
        assert changed == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_the_same_layout_again_is_bit_exact(whole, tmp_path):
    folder = tmp_path / "run"
    for until in (5, STEPS):
        allocate(folder, 2, until)
    assert curve(folder, STEPS) == curve(whole[0], STEPS)
    for name, value in average(whole[0]).items():
        assert average(folder)[name].equal(value), name


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_single_rank_goes_on_bit_exact(tmp_path, precision):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    layout = {"engine__zero_stage": 3, "engine__precision": precision}
    for folder, until in ((straight, STEPS), (stopped, 5), (stopped, STEPS)):
        allocate(folder, 1, until, **layout)
    assert curve(stopped, STEPS) == curve(straight, STEPS)
    for name, value in average(straight).items():
        assert average(stopped)[name].equal(value), name


def damaged_checkpoint(rank, ranks, parent):
    from coca_scale.engine.checkpoint import newest_intact
    from coca_scale.engine.launch import end_world, start_world

    world, notes = start_world(60), []
    found = newest_intact(Path(parent), world, notes)
    end_world()
    return found.name if found is not None else None, notes


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_for_an_older_one(whole, tmp_path):
    newest = whole[0] / "checkpoints" / f"step_{STEPS:08d}"
    older = tmp_path / "step_00000006"
    shutil.copytree(newest, older)
    shutil.copytree(newest, tmp_path / newest.name)
    victim = max((tmp_path / newest.name).rglob("*.pt"), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])
    found = on_ranks(damaged_checkpoint, 2, str(tmp_path))
    assert [name for name, _ in found] == [older.name, older.name]
    assert "going back to an older checkpoint" in found[0][1][0]
    assert (tmp_path / f"{newest.name}.damaged").is_dir()
