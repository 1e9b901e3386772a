"""Weights & Biases, for people who follow their runs there."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from coca_scale.errors import UserError
from coca_scale.recipe import Recipe
from coca_scale.recipe.public import PRIVATE, public_name, public_recipe
from coca_scale.recipe.whole_files import write_whole

IDENTITY = "wandb_id"
_IDENTITY = re.compile(rb"[0-9a-f]{12}")
FINISH_SECONDS = 60  # a job that was told to leave has minutes, and uploads can be repeated
# by itself it sends the command line, with every override of the recipe, paths of program and
# folder, the host's name, the user's, the remote of a git checkout and a list of packages
_NOTHING_OF_THIS_MACHINE: dict[str, Any] = {
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    **dict.fromkeys(("host", "program", "username", "email"), ""),
}


class Tracker:
    """One run there. A service that cannot be reached costs a line, never the training."""

    def __init__(self, recipe: Recipe, folder: Path, say: Callable[[str], None]) -> None:
        """Begin the run, or go on with the one of this run folder.

        Args:
            recipe: its `log.wandb` names the project.
            folder: the run folder; files of the service go to its subfolder wandb.
            say: takes a line for the person watching.
        """
        import wandb

        self._wandb = wandb
        self._say = say
        self._run: Any = None
        project = public_name(str(recipe.log.wandb))
        if project == PRIVATE:
            self._give_up(UserError("log.wandb does not look like the name of a project"))
            return
        identity = folder / IDENTITY
        known = identity.read_bytes().strip() if identity.is_file() else b""
        try:
            if not _IDENTITY.fullmatch(known):
                known = uuid4().hex[:12].encode()
                write_whole(identity, known + b"\n")
            self._run = wandb.init(
                project=project,
                name=public_name(recipe.run.name),
                id=known.decode(),
                resume="allow",
                dir=str(folder),
                config=public_recipe(recipe.model_dump()),
                settings=wandb.Settings(
                    finish_timeout=FINISH_SECONDS, console="off", **_NOTHING_OF_THIS_MACHINE
                ),
            )
        except (wandb.Error, OSError) as error:
            self._give_up(error)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers of a step.

        Steps that the service has already are left alone there: a resumed run makes them again.
        """
        if self._run is not None:
            try:
                self._run.log(dict(values), step=step)
            except self._wandb.Error as error:
                self._give_up(error)

    def picture(self, step: int, sheet: Path) -> None:
        """The captioned pictures of a validation."""
        if self._run is not None:
            self.log(step, {"val/captions": self._wandb.Image(str(sheet))})

    def close(self) -> None:
        """Send what is left, for a minute at most."""
        if self._run is not None:
            try:
                self._run.finish()
            except self._wandb.Error as error:
                self._give_up(error)
            self._run = None

    def _give_up(self, error: Exception) -> None:
        self._run = None
        words = " ".join(str(error).split())
        self._say(f"the run goes on without Weights & Biases: {words}")
