"""The entry that launchers start: arguments → recipe → Trainer.

deepspeed coca_scale/train.py --recipe recipes/tiny.yaml [key.path=value ...] [--dry-run]
"""

import argparse
import signal
import sys
import types
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in __main__.py, until `Signals` hear of it
if not __package__:  # started as a file: import the package, not the modules beside this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from coca_scale.engine.leaving import appoint_witness, leave, told
from coca_scale.engine.streams import outlive_readers
from coca_scale.recipe.exits import CRASHED
from coca_scale.recipe.text import tell
from coca_scale.training.requests import Signals


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
    with Signals() as signals:
        # imported with signals heeded, as it takes long
        from coca_scale.recipe import RecipeError, load_recipe

        try:
            recipe = load_recipe(options.recipe, options.overrides)
        except RecipeError as error:
            tell(str(error))
            return 2
        from coca_scale.training.run import dry_run, train

        return dry_run(recipe) if options.dry_run else train(recipe, signals)


def _crash(kind: type[BaseException], error: BaseException, _: types.TracebackType | None) -> None:
    """Before ranks watch each other: print the traceback and end, reaching for nobody again."""
    tell(told(error))
    if issubclass(kind, Exception):
        leave(CRASHED)


if __name__ == "__main__":
    outlive_readers()
    appoint_witness()
    sys.excepthook = _crash
    leave(main())
