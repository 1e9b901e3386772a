"""The keys of a recipe that say when a run saves and where it goes on."""

from __future__ import annotations

from pydantic import Field

from coca_scale.recipe.section import Minutes, PathText, PositiveInt, Section


class CheckpointSection(Section):
    """When to save, what to keep, and where to start from."""

    every_steps: PositiveInt | None = Field(
        1000, description="Steps between checkpoints; null saves at the end only."
    )
    every_minutes: Minutes | None = Field(
        None, description="Also save when so many minutes have passed since the last save."
    )
    keep: PositiveInt | None = Field(
        3, description="Newest checkpoints that are kept; null keeps all."
    )
    keep_every_steps: PositiveInt | None = Field(
        None, description="Checkpoints of these steps are kept for good."
    )
    background: bool = Field(
        True,
        description="Write while training goes on, from a copy in the host's memory; false, or no "
        "room for a copy, waits for the disk.",
    )
    resume: PathText = Field(
        "auto",
        description="auto: newest complete checkpoint of the run folder if there is one; "
        "never: start anew in an empty run folder; or a checkpoint folder.",
    )
