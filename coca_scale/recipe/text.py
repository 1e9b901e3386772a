"""Text from outside: how bytes become text, and what of a text may be kept or shown."""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import shlex
import sys
from typing import TextIO

from coca_scale.errors import UserError

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
# of terminals: colours and cursors (CSI), titles and links (OSC … BEL or ST), and short ones
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])")
_SURROGATES = re.compile(r"[\ud800-\udfff]")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and new line
_LINE_ENDS = re.compile(r"[\t\n\u2028\u2029]+")


def decoded(data: bytes, encoding: str | None = None) -> str:
    """Text of a file that others wrote; new lines as `\\n`. The locale is never asked.

    Args:
        data: UTF-8 with or without a byte order mark, or UTF-16 with one.
        encoding: what it is instead, as somebody says who knows.

    Raises:
        UnicodeError: it is something else; a NUL is no text either.
    """
    text = data.decode(encoding or marked_encoding(data)).removeprefix("\ufeff")
    if "\0" in text:
        raise UnicodeError("it has NUL characters")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def marked_encoding(start: bytes) -> str:
    """UTF-16 where a text begins with its mark, else UTF-8 with or without one."""
    return "utf-16" if start.startswith(_UTF16_MARKS) else "utf-8-sig"


def known_encoding(name: str) -> str:
    """The name of an encoding of text, as Python knows it.

    Raises:
        UserError: it is none.
    """
    try:
        with contextlib.suppress(UnicodeError):
            b" ".decode(name)  # refuses codecs that are not of text, such as hex
        return codecs.lookup(name).name
    except (LookupError, ValueError) as error:
        raise UserError(f"{name!r} is no encoding; say cp1252, shift_jis, koi8-r …") from error


def cleaned(text: str) -> str:
    """A caption as it may be tokenised, written into files and shown.

    Escape sequences go, other control characters become spaces, and halves of surrogate pairs,
    which no encoding can write, become U+FFFD.
    """
    text = _ESCAPES.sub("", text)
    return _SURROGATES.sub("\ufffd", _CONTROLS.sub(" ", text))


def one_line(text: str) -> str:
    """A caption, a class name or a template in one line, without spaces around it."""
    return _LINE_ENDS.sub(" ", cleaned(text)).strip()


def visible(text: str) -> str:
    """A message for a terminal: what would steer it is written out, as in `\\x1b`."""
    return _SURROGATES.sub(_written_out, _CONTROLS.sub(_written_out, text))


def tell(message: str, file: TextIO | None = None) -> None:
    """A message on stderr, or into `file`, that steers no terminal."""
    print(visible(message), file=file or sys.stderr, flush=True)


def shell_word(word: str) -> str:
    """A word as bash reads it back unchanged, on one line whatever is in it.

    Args:
        word: an argument or a path; it has no NUL, as none can.
    """
    if word.isprintable():
        return shlex.quote(word)
    # bytes, so that no locale of the shell has a say; a name need not be UTF-8
    escaped = (chr(b) if 31 < b < 127 and b not in b"'\\" else f"\\{b:03o}" for b in _bytes(word))
    return f"$'{''.join(escaped)}'"


def _bytes(word: str) -> bytes:
    try:
        return os.fsencode(word)
    except UnicodeEncodeError:  # half of a surrogate pair that stands for no byte
        return word.encode("utf-8", "surrogatepass")


def _written_out(character: re.Match[str]) -> str:
    return character[0].encode("unicode_escape").decode()
