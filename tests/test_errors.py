"""Faults of the user are one line; every other exception is ours, and keeps its traceback."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest
import torch

from coca_scale.errors import AgreedError, UserError, system_faults
from tests.ranks import TrainingRanks, on_ranks

VERB = """
import errno, sys
import typer
from coca_scale import cli
from coca_scale.errors import UserError

@cli.app.command("fail")
def fail(what: str) -> None:
    if what == "user":
        raise UserError("the recipe has no wheels; put some on")
    if what == "system":
        open("/no/such/folder/file", "w")
    if what == "value":
        list(zip([1], [], strict=True))
    raise OSError("made by hand in a library")

sys.argv = ["coca-scale", "fail", sys.argv[1]]
cli.main()
"""


def run_verb(what):
    done = subprocess.run(
        [sys.executable, "-c", VERB, what], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("user", "coca-scale: the recipe has no wheels; put some on\n"),
        ("system", "coca-scale: /no/such/folder/file: No such file or directory\n"),
    ],
)
def test_a_verb_tells_what_a_user_can_mend_in_one_line(what, line):
    assert run_verb(what) == (1, line)


@pytest.mark.parametrize("what", ["value", "library"])
def test_a_verb_keeps_the_traceback_of_our_own_faults(what):
    code, text = run_verb(what)
    assert code == 1
    assert text.startswith("Traceback")
    assert "argument 2 is shorter" in text or "made by hand" in text


def test_what_the_system_refuses_is_for_the_user():
    with (
        pytest.raises(UserError, match=r"^No space left on device; make room"),
        system_faults(),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UserError, match=r"as it was$"), system_faults():
        raise UserError("as it was")
    with pytest.raises(TypeError), system_faults():
        raise TypeError("ours")


def agree_on_rank(rank, ranks):
    from coca_scale.engine.launch import end_world, start_world

    world = start_world(60)
    told = []

    def note(call):
        try:
            told.append(call())
        except AgreedError as error:
            told.append(f"agreed: {error}")
        except ZeroDivisionError:
            told.append("ours")

    def fail_on(guilty, error):
        def action():
            if rank == guilty:
                raise error
            return rank

        return action

    note(lambda: world.agree(fail_on(None, None)))
    note(lambda: world.agree(fail_on(1, UserError("no data"))))
    note(lambda: world.agree(fail_on(0, OSError(errno.EACCES, "denied", "shards")), True))
    note(lambda: world.on_first(lambda: f"from {rank}"))
    note(lambda: world.on_first(fail_on(0, UserError("none there"))))
    note(lambda: world.on_first(fail_on(1, UserError("never run"))))
    note(lambda: world.gather(rank * 10))
    if rank == 1:  # a fault of ours leaves where it is, and is the watchdog's
        note(lambda: world.agree(fail_on(1, ZeroDivisionError())))
    end_world()
    return told


@pytest.mark.slow
def test_ranks_agree():
    first, second = on_ranks(agree_on_rank, 2)
    common = [
        *("agreed: no data", "agreed: shards: denied", "from 0", "agreed: none there", 0),
        [0, 10],
    ]
    assert first == [0, *common]
    assert second == [1, *common, "ours"]


@pytest.mark.slow
def test_a_run_tells_the_two_apart(tmp_path):
    arguments = ("--recipe", "recipes/tiny.yaml", f"run.dir={tmp_path / 'run'}")
    user = TrainingRanks(tmp_path / "user.log", *arguments, "data.train=nothing/*.tar")
    assert user.wait() == 1
    told = [line for line in user.output.splitlines() if "matches nothing" in line]
    assert told == ["coca-scale: nothing/*.tar: matches nothing"]
    assert "Traceback" not in user.output
    ours = TrainingRanks(tmp_path / "ours.log", *arguments, prepare=strict_zip)
    assert ours.wait() == 70
    assert ours.output.count("Traceback") == 1 and "argument 2 is shorter" in ours.output


def strict_zip():
    """A fault of our own in what every rank prepares."""
    from coca_scale.training import setup

    def broken(*_):
        return list(zip([1], [], strict=True))

    setup.make_tokenizer = broken


def test_a_file_in_the_place_of_a_folder_is_named_before_the_first_step(tmp_path):
    from coca_scale.engine.world import World
    from coca_scale.training.preflight import preflight

    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(AgreedError, match=r"checkpoints: File exists; .* move it away$"):
        preflight(World.alone(torch.device("cpu")), tmp_path, [])
