"""The keys of a recipe that say when a run saves and where it goes on."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

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
    mirror: PathText | None = Field(
        None,
        description="Bucket, s3://BUCKET/NAME or another url of fsspec, or a folder, that gets "
        "complete checkpoints, logs and export behind the run, and that a run with an empty folder "
        "goes on from; no other run's.",
    )

    @field_validator("mirror")
    @classmethod
    def _can_be_written(cls, url: str | None) -> str | None:
        if url is None:
            return None
        if url.startswith(("http:", "https:", "pipe:", "synthetic:")):
            raise ValueError("a bucket (s3://…, gs://…) or a folder; this cannot be written to")
        if re.match(r"[a-z0-9+.-]+://[^/]*:[^/]*@", url, re.IGNORECASE):
            raise ValueError("no passwords in a recipe; clients take them from the environment")
        return url
