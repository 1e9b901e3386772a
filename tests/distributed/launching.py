"""Whole runs of a tiny recipe, as tests start them."""

from __future__ import annotations

from tests.ranks import TrainingRanks

STEPS = 12
TINY = [
    "data.train=synthetic://shapes?count=512&size=48",
    "data.val=synthetic://shapes?split=val&count=12&size=48",
    "eval.every_steps=null",
    "train.global_batch=16",
    "train.micro_batch=4",
    f"train.steps={STEPS}",
    "checkpoint.every_steps=3",
    "log.every_steps=1",
]


def start(folder, *arguments, prepare=None):
    """A run on two ranks without a launcher; its log is beside the folder."""
    common = ("--recipe", "recipes/tiny.yaml", *TINY, f"run.dir={folder}")
    return TrainingRanks(folder.with_suffix(".log"), *common, *arguments, prepare=prepare)
