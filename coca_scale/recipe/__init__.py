"""Recipes: the validated description of a run."""

from coca_scale.recipe.batch import BatchSplit
from coca_scale.recipe.load import RecipeError, dump_recipe, load_recipe, recipe_from_dict
from coca_scale.recipe.schema import Recipe

__all__ = ["BatchSplit", "Recipe", "RecipeError", "dump_recipe", "load_recipe", "recipe_from_dict"]
