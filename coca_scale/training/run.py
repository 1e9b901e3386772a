"""Start a run, or show what it would be."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader processes are forked

import torch

from coca_scale.engine.config import deepspeed_config, transfers
from coca_scale.engine.host import free_memory
from coca_scale.engine.launch import (
    LaunchError,
    end_world,
    start_world,
)
from coca_scale.engine.ownership import owned
from coca_scale.engine.planned import planned_rank, planned_size
from coca_scale.engine.watchdog import NoWatchdog, Watchdog
from coca_scale.engine.world import World
from coca_scale.errors import AgreedError, UserError
from coca_scale.inference.load import pretrained_name
from coca_scale.model import CoCa, LogitScale, ModelConfig
from coca_scale.model.freeze import freeze
from coca_scale.recipe import BatchSplit, Recipe, load_recipe
from coca_scale.recipe.exits import CRASHED
from coca_scale.recipe.lock import run_claim
from coca_scale.recipe.stages import faults_of, recipes_of
from coca_scale.recipe.text import tell
from coca_scale.training.bad_steps import Rollback
from coca_scale.training.events import append_failure
from coca_scale.training.mirror import mirror_of
from coca_scale.training.positions import Skip
from coca_scale.training.requests import Signals
from coca_scale.training.trainer import Trainer

USUAL_RANKS = (1, 2, 8, 64, 384, 512, 4096)


def train(recipe: Recipe, signals: Signals) -> int:
    """Run to the end, or until the cluster wants its nodes back.

    Args:
        recipe: what to do.
        signals: to this process.

    Returns:
        0; 1 after one readable line about what went wrong; CRASHED if the ranks did not come
        together; REQUEUE if the job should be started again. An error that is neither the recipe's
        nor the data's ends this process here, with its traceback if it was the first on any rank.
    """
    folder = recipe.run.folder
    try:
        world = start_world(recipe.engine.start_timeout_minutes * 60)
    except LaunchError as error:
        if planned_rank() == 0 or str(error).startswith("rank "):
            tell(f"coca-scale: {error}")
        if planned_rank() == 0:
            append_failure(folder, error.at_fault, str(error))
        return CRASHED
    watchdog = Watchdog(
        world,
        folder,
        recipe.engine.silence_timeout_minutes * 60,
        lambda ranks, told: append_failure(folder, {r: world.hosts[r] for r in ranks}, told),
    )
    try:
        code = _train_stages(recipe, world, watchdog, signals)
    except AgreedError as error:
        if world.rank == 0:
            tell(f"coca-scale: {error}")
        code = 1
    except Exception as error:  # noqa: BLE001 - every rank must end, and the first say why
        watchdog.fail(error)
    world.barrier()  # the launcher ends everyone as soon as one rank is gone
    watchdog.stop()
    end_world()
    return code


def _train_stages(
    recipe: Recipe,
    world: World,
    watchdog: Watchdog | NoWatchdog,
    signals: Signals | None = None,
) -> int:
    """Train stage after stage, and after a bad stretch again from the last checkpoint.

    A stage begins from the checkpoint that the one before has left, as if the job were started
    again there. After a bad stretch the run goes on with the data behind it.
    """
    left, skip = recipe.health.rollbacks, None
    with (
        owned(run_claim(recipe.run.folder), world) as owner,
        closing(mirror_of(recipe, world, owner, watchdog)) as mirror,
    ):

        def to_a_checkpoint() -> int | None:
            """Train until there is one to go on from, or the run ends: its exit code."""
            nonlocal left, skip
            trainer = Trainer(recipe, world, watchdog, left, skip, owner, signals, mirror)
            skip = None
            try:
                code = trainer.run()
            except Rollback as bad:
                code, left = None, left - 1
                skip = Skip(trainer.stage.number, trainer.lanes)
                if world.rank == 0:
                    tell(f"going back to the last checkpoint: {bad}")
            if code is None:
                trainer.close()
            return code

        while True:
            code = to_a_checkpoint()
            if code is not None:
                return code
            free_memory()  # of a model that would lie beside the next one
            again = recipe.checkpoint.model_copy(update={"resume": "auto"})
            recipe = recipe.model_copy(update={"checkpoint": again})


def train_recipe(recipe: Recipe | str | Path, *overrides: str) -> Path:
    """Train in this process, or in this rank of a job that a launcher started.

    Args:
        recipe: a loaded recipe, or the path of one.
        overrides: `key.path=value`, for a path.

    Returns:
        The run folder.

    Raises:
        RecipeError: the recipe cannot be used.
        AgreedError: data or weights cannot be used, the loss is not finite, or another job trains
            into the run folder.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif overrides:
        raise UserError("overrides are for the path of a recipe; change a loaded one itself")
    world = start_world(recipe.engine.start_timeout_minutes * 60)
    with Signals(whole_process=False) as signals:
        _train_stages(recipe, world, NoWatchdog(), signals)
    return recipe.run.folder


def dry_run(recipe: Recipe) -> int:
    """Print model size, batch arithmetic and the DeepSpeed configuration; train nothing."""
    if planned_rank() != 0:
        return 0
    out, ranks = sys.stdout, planned_size()
    try:
        for name, stage in recipes_of(recipe).items():
            with faults_of(name):
                lines = list(_described(stage, ranks))
            for line in [name, *lines] if name else lines:
                tell(line, out)
    except UserError as error:
        tell(str(error))
        return 2
    return 0


def _described(recipe: Recipe, ranks: int) -> Iterator[str]:
    """Lines about a run that has this recipe from its beginning to its end.

    Raises:
        UserError: the recipe does not fit the model or the ranks.
    """
    config = ModelConfig.from_recipe(recipe.model).for_loss(recipe.loss)
    batch = BatchSplit.from_recipe(recipe, ranks)
    with torch.device("meta"):
        model = CoCa(config)
        freeze(model, recipe.model, recipe.loss)
    scale = sum(p.numel() for p in LogitScale.of(config).parameters())
    total = _count(model, trained_only=False) + scale
    yield f"model        {recipe.model.name}: {total:,} parameters"
    for name, child in model.named_children():
        count, trained = _count(child, trained_only=False), _count(child, trained_only=True)
        note = "" if trained == count else f", {count - trained:,} locked"
        yield f"  {name:<16}{count:>15,}{note}"
    if recipe.model.pretrained is not None:
        yield f"weights      {pretrained_name(recipe.model)}, not read in a dry run"
    if recipe.loss.distill.teacher is not None:
        yield f"teacher      {recipe.loss.distill.teacher}, not read in a dry run"
    yield (
        f"batch        {batch.global_batch:,} = {batch.ranks} ranks × {batch.accumulation} "
        f"accumulation × {batch.micro_batch} micro-batch; {batch.lanes} lanes"
    )
    for other in USUAL_RANKS:
        yield f"  on {other:>4} ranks  {_arithmetic(recipe, other)}"
    yield "deepspeed configuration"
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    yield json.dumps(deepspeed_config(recipe, batch, transfers(model), per_node), indent=2)


def _arithmetic(recipe: Recipe, ranks: int) -> str:
    try:
        batch = BatchSplit.from_recipe(recipe, ranks)
    except UserError as error:
        return str(error)
    return f"accumulation {batch.accumulation}, {batch.lanes_per_rank} lanes per rank"


def _count(module: torch.nn.Module, trained_only: bool) -> int:
    parameters = module.parameters()
    return sum(p.numel() for p in parameters if p.requires_grad or not trained_only)
