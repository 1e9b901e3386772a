"""Ranks of a job as processes of this machine.

They are forked from a server that has imported torch, DeepSpeed and what the tests import:
importing those anew takes longer than most tests train.
"""

from __future__ import annotations

import gc
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from coca_scale.recipe import Recipe
from tests.ports import free_port

FORKED = mp.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        "coca_scale.training.run",
        "deepspeed.runtime.zero.muon.muon_optimizer",  # DeepSpeed imports it with any optimizer
        "tests.conftest",
        "tests.ranks",
        "transformers.modeling_utils",
    ]
)


def on_ranks(function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """Run `function(rank, ranks, *args)` in `ranks` processes; results in rank order."""
    with FORKED.Manager() as manager:
        results = manager.dict()
        job = (function, results, args)
        common = (ranks, free_port(), dict(os.environ))
        mp.start_processes(_call, (*common, *job), nprocs=ranks, start_method="forkserver")
        return [results[rank] for rank in range(ranks)]


@contextmanager
def quiet() -> Iterator[None]:
    """What is printed inside goes nowhere."""
    with Path(os.devnull).open("w") as silence, redirect_stdout(silence):
        yield


def train_all(_rank: int, _ranks: int, recipes: list[Recipe]) -> None:
    """For `on_ranks`: train one recipe after the other."""
    from coca_scale.engine.launch import start_world
    from coca_scale.training.trainer import Trainer

    world = start_world()
    with quiet():
        for recipe in recipes:
            trainer = Trainer(recipe, world)
            trainer.run()
            trainer.engine.close()


class TrainingRanks:
    """`coca_scale/train.py` on every rank, as a launcher starts it.

    Args:
        log: file for what they print.
        arguments: of every rank.
        ranks: how many.
        prepare: called in every rank before it starts.
    """

    def __init__(
        self,
        log: Path,
        *arguments: str,
        ranks: int = 2,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self._log = log
        common = (ranks, free_port(), dict(os.environ), log, arguments, prepare)
        self.processes = [
            FORKED.Process(target=_train, args=(rank, *common)) for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    @property
    def output(self) -> str:
        """Of all ranks so far."""
        return self._log.read_text() if self._log.exists() else ""

    @property
    def alive(self) -> bool:
        """Whether no rank has ended."""
        return all(process.exitcode is None for process in self.processes)

    def kill(self) -> None:
        """All at once."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def wait(self, seconds: float = 300) -> int:
        """The highest exit code, once every rank has ended."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        if any(process.exitcode is None for process in self.processes):
            self.kill()
            raise TimeoutError(f"still running after {seconds} s\n{self.output[-3000:]}")
        return max(process.exitcode or 0 for process in self.processes)


def _join(rank: int, ranks: int, port: int, environ: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(
        environ,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    gc.freeze()  # what is imported stays: no need to look through it again and again


def _call(
    rank: int,
    ranks: int,
    port: int,
    environ: dict[str, str],
    function: Callable[..., Any],
    results: Any,
    args: tuple[Any, ...],
) -> None:
    _join(rank, ranks, port, environ)
    results[rank] = function(rank, ranks, *args)


def _train(
    rank: int,
    ranks: int,
    port: int,
    environ: dict[str, str],
    log: Path,
    arguments: tuple[str, ...],
    prepare: Callable[[], None] | None,
) -> None:
    _join(rank, ranks, port, environ)
    if prepare is not None:
        prepare()
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = ["coca_scale/train.py", *arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except Exception as error:  # noqa: BLE001 - multiprocessing would hide it from the hook
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)
