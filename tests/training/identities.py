"""What checkpoints of recipes keep, without the runs that would write them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from coca_scale.data.sources import open_source
from coca_scale.data.tokens import make_tokenizer
from coca_scale.model import ModelConfig
from coca_scale.recipe import BatchSplit
from coca_scale.recipe.stages import stages_of
from coca_scale.training.identity import identify

HERE = Path("runs/x/checkpoints/step_00000004")


def is_of(run, ranks=2, stage=1, step=None):
    """What a checkpoint of a recipe keeps, and what a run of it compares that with."""
    stages = stages_of(run, lambda: None)
    here = stages[stage - 1]
    recipe, step = here.recipe, here.first if step is None else step
    config = ModelConfig.from_recipe(recipe.model)
    source = open_source(recipe.data.train, recipe.data, recipe.run.seed)
    identity = identify(run, recipe, ranks, make_tokenizer(config), source)
    lanes = BatchSplit.from_recipe(recipe, ranks).lanes
    saved = {
        "step": step,
        "samples_seen": here.samples_seen(step),
        "stage": stage,
        "model_cfg": config.to_dict(),
        "lanes": [[0] * 5] * lanes,
        "identity": asdict(identity),
    }
    return json.loads(json.dumps(saved)), (identity, config, lanes, here)
