"""Python's garbage collection between steps.

Left to itself it comes on every rank at another time, and all ranks wait for each of the pauses.
"""

from __future__ import annotations

import gc


class GarbageCollection:
    """Inside the block garbage is collected in `after_step` alone.

    Args:
        every: steps between collections; None leaves them to Python.
    """

    def __init__(self, every: int | None) -> None:
        self._every = every

    def __enter__(self) -> GarbageCollection:
        if self._every is not None:
            gc.collect()
            gc.freeze()  # modules, model, optimizer: never garbage, and most of what is looked at
            gc.disable()
        return self

    def after_step(self, step: int) -> None:
        """Collect if it is time; the same on every rank."""
        if self._every is not None and step % self._every == 0:
            gc.collect()

    def __exit__(self, *_: object) -> None:
        if self._every is not None:
            gc.enable()
            gc.unfreeze()
