"""The entry that launchers start: arguments → recipe → Trainer.

deepspeed coca_scale/train.py --recipe recipes/tiny.yaml [key.path=value ...] [--dry-run]
"""

import argparse
import os
import sys
import types
from pathlib import Path

if not __package__:  # started as a file: import the package, not the modules beside this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from coca_scale.recipe import RecipeError, load_recipe
from coca_scale.recipe.exits import CRASHED


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line of the main job."""
    parser = argparse.ArgumentParser(
        description="Train a CoCa with DeepSpeed.",
        epilog="example: deepspeed coca_scale/train.py --recipe recipes/tiny.yaml optim.lr=1e-3",
    )
    parser.add_argument("--recipe", required=True, help="YAML recipe, see recipes/")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would run, and train nothing"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # from the launcher
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="change the recipe")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the job; returns the exit code: 2 for a wrong recipe, 1 for a failed run."""
    options = parse(arguments)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    from coca_scale.training.run import dry_run, train  # heavy imports, after the recipe is known

    return dry_run(recipe) if options.dry_run else train(recipe)


def _crash(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    """Before ranks watch each other: print the traceback and end, reaching for nobody again."""
    sys.__excepthook__(kind, error, trace)
    if issubclass(kind, Exception):
        sys.stderr.flush()
        os._exit(CRASHED)


if __name__ == "__main__":
    sys.excepthook = _crash
    sys.exit(main())
