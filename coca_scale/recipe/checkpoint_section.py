"""The keys of a recipe that say when a run saves and where it goes on."""

from __future__ import annotations

import re

from pydantic import Field, field_validator, model_validator

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
    local_every_steps: PositiveInt | None = Field(
        None,
        description="Steps between saves on the nodes themselves, each of which also has the files "
        "of another one; a start goes on from the newest. null makes none.",
    )
    local_dir: PathText | None = Field(
        None,
        description="Folder of every node for those, such as /dev/shm, which is memory; it must "
        "outlive the processes. null: TMPDIR of the node, or /tmp.",
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
        if re.search(r"://[^/]*:[^/]*@", url):
            raise ValueError("no passwords in a recipe; clients take them from the environment")
        return url

    @model_validator(mode="after")
    def _local_saves_are_in_between(self) -> CheckpointSection:
        local, shared = self.local_every_steps, self.every_steps
        if local is not None and shared is not None and local >= shared:
            raise ValueError(
                f"local_every_steps {local} is for saves between those of every_steps {shared}; "
                "it must be below that"
            )
        return self
