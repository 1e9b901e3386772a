"""Train, export and use CoCa (contrastive captioner) models, sharded by DeepSpeed ZeRO-3.

from coca_scale import load_model
model = load_model("runs/tiny")
print(model.caption(["photo.jpg"]))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from coca_scale.version import __version__

if TYPE_CHECKING:
    from coca_scale.inference.load import LoadedModel, load_model
    from coca_scale.model.config import available_models, load_model_config
    from coca_scale.recipe import Recipe, RecipeError, load_recipe
    from coca_scale.training.run import train_recipe

__all__ = [
    "LoadedModel",
    "Recipe",
    "RecipeError",
    "__version__",
    "available_models",
    "load_model",
    "load_model_config",
    "load_recipe",
    "train_recipe",
]

_HOME = {
    "LoadedModel": "coca_scale.inference.load",
    "Recipe": "coca_scale.recipe",
    "RecipeError": "coca_scale.recipe",
    "available_models": "coca_scale.model.config",
    "load_model": "coca_scale.inference.load",
    "load_model_config": "coca_scale.model.config",
    "load_recipe": "coca_scale.recipe",
    "train_recipe": "coca_scale.training.run",
}


def __getattr__(name: str) -> Any:
    """Import torch and DeepSpeed only when something is used that needs them."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
