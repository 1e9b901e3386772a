"""When a run saves, and what it says about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from coca_scale.engine.checkpoint import CheckpointWriter, SaveReport
from coca_scale.engine.watchdog import NoWatchdog, Watchdog
from coca_scale.errors import AgreedError
from coca_scale.recipe.schema import CheckpointSection
from coca_scale.training.log import RunLog


class Saver:
    """Saves of a run. All methods are collectives.

    A save that fails, as on a full disk, is a warning: the run goes on and older checkpoints stay.
    Only the one a run ends with must succeed.
    """

    def __init__(
        self,
        writer: CheckpointWriter,
        section: CheckpointSection,
        progress: Callable[[], dict[str, Any]],
        log: RunLog,
        watchdog: Watchdog | NoWatchdog,
        timeout_seconds: float,
    ) -> None:
        self._writer = writer
        self._section = section
        self._progress = progress
        self._log = log
        self._watchdog = watchdog
        self._timeout = timeout_seconds
        self._newest: int | None = None

    @property
    def written_here(self) -> bool:
        """Whether this rank has nothing more to do for the save under way."""
        return self._writer.written_here

    def due(self, step: int) -> bool:
        """Whether the recipe saves after this step."""
        every = self._section.every_steps
        return every is not None and step % every == 0

    def save(self) -> None:
        """Save now; with `checkpoint.background` the disk is not waited for."""
        with self._phase():
            if self._writer.pending:
                self._tell(self._writer.finish())
            progress = self._progress()
            failed = self._writer.begin(progress)
        if failed is not None:
            self._tell(failed)
        else:
            self._newest = progress["step"]
            if not self._section.background:
                self.finish()

    def finish(self) -> SaveReport | None:
        """Wait for the save under way, if there is one."""
        if not self._writer.pending:
            return None
        with self._phase():
            report = self._writer.finish()
        self._tell(report)
        return report

    def last(self, step: int) -> None:
        """Leave a checkpoint of `step`, unless there is one already.

        Raises:
            AgreedError: it cannot be saved.
        """
        report = self.finish()
        if self._newest == step and (report is None or report.error is None):
            return
        self.save()
        report = self.finish()
        if report is not None and report.error is not None:
            raise AgreedError(
                f"the last checkpoint cannot be saved: {report.error}; make room, and start the "
                "same command again to go on from the one before"
            )

    def _phase(self) -> Any:
        return self._watchdog.phase("saving", self._timeout)

    def _tell(self, report: SaveReport) -> None:
        if report.error is not None:
            self._newest = None
        prefix = "" if report.error is None else "warning: "
        self._log.say(f"{prefix}{report}")
