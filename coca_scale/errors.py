"""What a user can mend, told apart from what we must."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

_ROOM = "make room there (df -h, and df -i for the number of files)"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: f"{_ROOM}, or have the quota raised",
    errno.EROFS: "choose another place, or mount it for writing",
    errno.EMFILE: "let a process open more files (ulimit -n)",
    errno.ENOTDIR: "a file is in the place of a folder; move it away",
    errno.EEXIST: "what is in the place of this folder is none, or a link to nothing; move it away",
    errno.ESTALE: "the file server has lost it; mount it anew",
}


class UserError(ValueError):
    """Something to mend in a recipe, in data, in a file or on the machine; a sentence says how.

    The verbs and the training job show it as one line. Every other exception is a fault of this
    package, and keeps its traceback.
    """


class AgreedError(UserError):
    """Something that ends the run, raised by every rank together: one rank may report it."""


@contextmanager
def system_faults() -> Iterator[None]:
    """What the operating system refuses inside becomes a UserError: a full disk, a missing folder.

    An OSError without a number is made by hand in some library, and passes.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, UserError) or error.errno is None:
            raise
        raise UserError(refusal(error)) from error


def refusal(error: OSError) -> str:
    """What the operating system refused, and what may help."""
    what = f"{error.filename}: " if error.filename is not None else ""
    advice = f"; {_REMEDIES[error.errno]}" if error.errno in _REMEDIES else ""
    return f"{what}{error.strerror or error}{advice}"
