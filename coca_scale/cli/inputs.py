"""Models and data as verbs name them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from coca_scale.cli.arguments import Precision
from coca_scale.cli.listing import ListArguments

if TYPE_CHECKING:
    import torch

    from coca_scale.engine.world import World
    from coca_scale.evaluation.pictures import Part
    from coca_scale.inference.load import LoadedModel
    from coca_scale.recipe.data import DataSection


def open_inputs(inputs: list[str], listing: ListArguments, captions_needed: bool) -> list[Part]:
    """What DATA or INPUTS of a verb name."""
    from coca_scale.data.listing import ListOptions
    from coca_scale.evaluation.pictures import open_pictures

    options = ListOptions(**listing)
    return open_pictures(inputs, data_section(inputs), options, captions_needed)


def open_shards(shards: list[str], captions: list[str]) -> list[Part]:
    """What SHARDS of a verb names, with the captions of these names, or those of `data pack`."""
    from coca_scale.data.listing import ListOptions
    from coca_scale.evaluation.pictures import open_pictures
    from coca_scale.recipe.data import DataSection

    named = {"train": shards, "captions": dict.fromkeys(captions, 1.0)}
    return open_pictures(shards, DataSection.model_validate(named), ListOptions())


def data_section(inputs: list[str]) -> DataSection:
    """How data is read, without a recipe."""
    from coca_scale.recipe.data import DataSection

    return DataSection.model_validate({"train": inputs})


@contextmanager
def ranks() -> Iterator[World]:
    """The processes of a launch by torchrun, srun, mpirun or deepspeed, or this one alone."""
    from coca_scale.engine.planned import planned_size
    from coca_scale.engine.world import World

    if planned_size() == 1:
        yield World.alone(_own_device())
        return
    from coca_scale.engine.launch import end_world, start_world  # DeepSpeed takes seconds
    from coca_scale.training.requests import Signals

    with Signals():  # no rank outlives its launcher
        with contextlib.redirect_stdout(io.StringIO()):  # it says which op it has built
            world = start_world()
        yield world
        end_world()


def load(
    model: str,
    config: str | None,
    raw_weights: bool,
    precision: Precision = Precision.FP32,
    world: World | None = None,
) -> LoadedModel:
    """A model on this rank's accelerator, or on the CPU; every rank gets one, or none does."""
    import torch

    from coca_scale.inference.load import load_model

    dtype = torch.bfloat16 if precision is Precision.BF16 else torch.float32
    if world is None:
        return load_model(model, config, raw_weights).to(_own_device(), dtype)
    loaded = world.agree(lambda: load_model(model, config, raw_weights), first_alone=True)
    return loaded.to(world.device, dtype)


def _own_device() -> torch.device:
    """Where a process that is alone computes."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
