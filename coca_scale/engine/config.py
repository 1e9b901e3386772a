"""The DeepSpeed configuration of a recipe, with every key written that a run relies on."""

from __future__ import annotations

from typing import Any

from coca_scale.planning.plan import REDUCE_BUCKET
from coca_scale.recipe import BatchPlan, Recipe


def deepspeed_config(recipe: Recipe, plan: BatchPlan) -> dict[str, Any]:
    """What `deepspeed.initialize` is given; `engine.deepspeed` of the recipe is merged over it."""
    stage, precision = recipe.engine.zero_stage, recipe.engine.precision
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero |= {
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": REDUCE_BUCKET,
            "stage3_param_persistence_threshold": 10_000,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    config: dict[str, Any] = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": recipe.optim.clip_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16", "loss_scale": 0, "initial_scale_power": 16},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    return _merge(config, recipe.engine.deepspeed)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            value = _merge(inner, value)
        merged[key] = value
    return merged
