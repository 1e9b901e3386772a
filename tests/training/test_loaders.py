"""When a run starts its loader processes, which are copies of what is in memory then."""

from __future__ import annotations

import multiprocessing
import os

import psutil

from tests.conftest import tiny_recipe
from tests.ranks import on_ranks, quiet


def loaders_of_runs(_rank, _ranks, folder):
    """Loader processes that are there when the model is built, of a run, its end and a rollback."""
    from coca_scale.engine.launch import start_world
    from coca_scale.training import setup
    from coca_scale.training.positions import Skip
    from coca_scale.training.trainer import Trainer

    world, found, build = start_world(), [], setup.initial_model

    def look_and_build(*args):
        pids = [process.pid for process in multiprocessing.active_children()]
        assert [psutil.Process(pid).ppid() for pid in pids] == [os.getpid()] * len(pids)
        found.append(pids)
        return build(*args)

    setup.initial_model = look_and_build
    recipe = tiny_recipe(run__dir=folder, train__steps=2, data__workers=2)
    for steps, back in ((2, False), (2, False), (3, False), (4, True)):
        train = recipe.train.model_copy(update={"steps": steps})
        recipe = recipe.model_copy(update={"train": train})
        with quiet():
            trainer = Trainer(recipe, world, skip=Skip(1, found[1][0]) if back else None)
            began = dict(trainer.lanes)
            trainer.run()
            trainer.close()
        found.append((began, trainer.lanes))
    found.append(multiprocessing.active_children())
    return found


def test_loader_processes_never_see_the_model(tmp_path):
    ((first, one, again, two, more, three, other, four, left),) = on_ranks(
        loaders_of_runs, 1, str(tmp_path / "run")
    )
    assert [len(pids) for pids in (first, again, more, other)] == [2, 0, 2, 2]
    assert not set(first) & set(more)
    assert left == []
    assert two[0] == two[1] == one[1]  # nothing was left to train
    assert three[0] == one[1]
    assert four[0] == one[0] != three[1]
