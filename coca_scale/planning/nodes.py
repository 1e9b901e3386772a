"""What `slurm/launch.sh` asks about a recipe: its run folder, and over how many nodes it divides.

python -m coca_scale.planning.nodes RECIPE NODES RANKS_PER_NODE [key.path=value ...]
"""

from __future__ import annotations

import sys

from coca_scale.errors import UserError
from coca_scale.recipe import BatchSplit, Recipe, load_recipe
from coca_scale.recipe.stages import faults_of, recipes_of
from coca_scale.recipe.text import tell


def node_counts(recipe: Recipe, most: int, ranks_per_node: int) -> list[int]:
    """Numbers of nodes, from `most` downwards, over whose ranks every stage divides.

    Raises:
        UserError: `most` is none of them.
    """
    split_over(recipe, most * ranks_per_node)
    return [most, *(n for n in range(most - 1, 0, -1) if _divides(recipe, n * ranks_per_node))]


def split_over(recipe: Recipe, ranks: int) -> None:
    """See that the batch of every stage divides over the ranks.

    Raises:
        UserError: naming the stage that does not.
    """
    for name, stage in recipes_of(recipe).items():
        with faults_of(name):
            BatchSplit.from_recipe(stage, ranks)


def _divides(recipe: Recipe, ranks: int) -> bool:
    try:
        split_over(recipe, ranks)
    except UserError:
        return False
    return True


def main(path: str, most: str, ranks_per_node: str, *overrides: str) -> int:
    """Two lines on stdout: the run folder, and the numbers of nodes; returns the exit code."""
    try:
        recipe = load_recipe(path, [word for word in overrides if "=" in word])
        counts = node_counts(recipe, int(most), int(ranks_per_node))
    except UserError as error:
        tell(str(error))
        return 2
    tell(f"{recipe.run.folder}\n{' '.join(map(str, counts))}", sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
