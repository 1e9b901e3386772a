"""From what the recipe names to a source."""

from __future__ import annotations

from collections.abc import Sequence

from coca_scale.data.sample import DataError, Source
from coca_scale.data.shards import ShardSource, expand_shards
from coca_scale.data.synthetic import Shapes
from coca_scale.data.tables import CaptionTable, IndexedSource
from coca_scale.recipe.schema import DataSection

TABLE_SUFFIXES = (".csv", ".tsv")


def open_source(spec: str | Sequence[str], data: DataSection, seed: int) -> Source:
    """A source for `data.train` or `data.val`.

    Raises:
        DataError: names nothing, or mixes kinds of sources.
    """
    patterns = [spec] if isinstance(spec, str) else list(spec)
    kinds = {_kind(pattern) for pattern in patterns}
    if len(kinds) > 1:
        raise DataError(f"{', '.join(patterns)}: shards, tables and synthetic data do not mix")
    kind = kinds.pop()
    if kind == "synthetic":
        if len(patterns) > 1:
            raise DataError("give one synthetic:// source, not a list")
        return IndexedSource(Shapes.from_url(patterns[0]), patterns[0], seed)
    if kind == "table":
        table = CaptionTable(patterns, data.image_column, data.caption_column)
        return IndexedSource(table, ", ".join(patterns), seed)
    return ShardSource(expand_shards(patterns), seed, data.shuffle_window)


def _kind(pattern: str) -> str:
    if pattern.startswith("synthetic://"):
        return "synthetic"
    return "table" if pattern.endswith(TABLE_SUFFIXES) else "shards"
