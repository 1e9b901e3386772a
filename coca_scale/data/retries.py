"""Reads that are tried again while what went wrong may pass."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

from coca_scale.errors import UserError

T = TypeVar("T")

FIRST_WAIT_SECONDS = 0.2
LONGEST_WAIT_SECONDS = 30.0


class StorageError(UserError, OSError):
    """A shard that cannot be read, after all retries."""


def with_retries(
    action: Callable[[], T], url: str, retries: int, reset: Callable[[], None] = lambda: None
) -> T:
    """The result of `action`, tried again with growing pauses after an OSError, which may pass.

    Raises:
        FileNotFoundError: there is no such object; it is not asked for again.
        StorageError: access is denied, or the last attempt failed too.
    """
    for attempt in range(retries + 1):
        try:
            return action()
        except (FileNotFoundError, StorageError):
            raise
        except PermissionError as error:
            raise StorageError(f"{url}: access denied: {first_line(error)}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            reset()
            if attempt == retries:
                raise StorageError(
                    f"{url}: failed {retries + 1} times, last with {first_line(error)}"
                ) from error
        pause = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2**attempt)
        time.sleep(pause * random.uniform(0.5, 1.0))  # ranks must not come back in step
    raise AssertionError("unreachable")


def first_line(error: BaseException) -> str:
    """What an exception says, or its name if it says nothing."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
