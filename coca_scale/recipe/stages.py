"""A run as a row of stages, each a recipe of its own; a run without any is one stage.

All stages have the same lanes, so that data goes on at the very sample where they meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from coca_scale.errors import UserError
from coca_scale.recipe.schema import Recipe
from coca_scale.recipe.section import MAX_STEPS
from coca_scale.recipe.total_steps import total_steps


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
        number: from 1.
        of: stages of the run.
        recipe: what holds in it; its length is that of the stage, and it has no stages itself.
        first: steps of the run before it.
        last: steps of the run at its end.
        samples_before: that the run has seen before it.
        begins_schedule: whether its peak learning rate and warm-up are of a schedule that begins.
        lr_factor: on what the schedule gives.
        own_losses: keys of the section loss that it names itself.
    """

    number: int
    of: int
    recipe: Recipe
    first: int
    last: int
    samples_before: int
    begins_schedule: bool = True
    lr_factor: float = 1.0
    own_losses: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """For messages, empty where it is the only one."""
        return _name(self.number, self.of)

    def samples_seen(self, step: int) -> int:
        """Samples of the run after `step` of its steps, the last of them in this stage."""
        return self.samples_before + (step - self.first) * self.recipe.train.global_batch


def recipes_of(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe of every stage, by its name; that of a run without stages has an empty one."""
    count = len(recipe.schedule.stages)
    return {_name(n + 1, count): recipe.of_stage(n) for n in range(count)} or {"": recipe}


@contextmanager
def faults_of(name: str) -> Iterator[None]:
    """What is wrong inside names the stage.

    Raises:
        UserError: as was raised inside.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}" if name else str(error)) from error


def stages_of(recipe: Recipe, samples_per_epoch: Callable[[], int | None]) -> list[Stage]:
    """The stages of a run.

    Args:
        recipe: of the run.
        samples_per_epoch: asked where its length is in epochs.

    Raises:
        UserError: as `total_steps`.
    """
    named = recipe.schedule.stages
    if not named:
        known = samples_per_epoch() if recipe.train.epochs is not None else None
        return [Stage(1, 1, recipe, 0, total_steps(recipe.train, known), 0)]
    found: list[Stage] = []
    steps = samples = 0
    for index, (section, own) in enumerate(zip(named, recipes_of(recipe).values(), strict=True)):
        begins = index == 0 or section.lr is not None
        last = steps + total_steps(own.train, None)
        about = (begins, section.lr_factor, frozenset(section.sections()["loss"]))
        found.append(Stage(index + 1, len(named), own, steps, last, samples, *about))
        steps, samples = last, found[-1].samples_seen(last)
    if steps > MAX_STEPS:
        raise UserError(f"the stages have {steps:,} steps; at most {MAX_STEPS:,} can be counted")
    return found


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that goes on after `step` steps; at the end of the run the last one."""
    return next((stage for stage in stages if step < stage.last), stages[-1])


def schedule_at(stages: Sequence[Stage], step: int) -> tuple[Stage, int]:
    """The stage in which the schedule of step `step` (from 0) began, and how many steps it has."""
    here = stage_at(stages, step)
    begins = [stage for stage in stages if stage.begins_schedule]
    first = max((s for s in begins if s.number <= here.number), key=lambda s: s.number)
    ends = [stage.first for stage in begins if stage.number > here.number]
    return first, min(ends, default=stages[-1].last) - first.first


def _name(number: int, of: int) -> str:
    return f"stage {number} of {of}" if of > 1 else ""
