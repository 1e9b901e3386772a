"""What a user can mend, told apart from what we must."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


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
        what = f"{error.filename}: " if error.filename is not None else ""
        raise UserError(f"{what}{error.strerror}") from error
