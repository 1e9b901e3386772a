"""A row of what `coca-scale doctor` found, and the table of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

_STYLES = {"ok": "green", "missing": "red", "broken": "red"}


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    Attributes:
        name: of the thing.
        status: ok, missing (not there) or broken (there, and does not work).
        found: what was seen, in one line.
        fix: what to do unless it is ok, in one line.
        needed: whether training on this machine needs it; the rest are notes.
    """

    name: str
    status: Literal["ok", "missing", "broken"]
    found: str
    fix: str = ""
    needed: bool = True


def show(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print a table that fits 80 columns; without a terminal it has no colours."""
    console = console or Console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("check", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("found", overflow="fold")
    for row in rows:
        note = row.status != "ok" and not row.needed
        style = "dim" if note else _STYLES[row.status]
        found = Text(row.found)
        if row.status != "ok":
            found.append(f"\n→ {row.fix}", "dim" if note else "bold")
        table.add_row(row.name, Text(row.status + (" (note)" if note else ""), style), found)
    console.print(table)
