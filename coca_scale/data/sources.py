"""From what the recipe names to a source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coca_scale.data.images import TrainCrop
from coca_scale.data.naming import is_table
from coca_scale.data.rows import TableOptions
from coca_scale.data.rules import SampleRules
from coca_scale.data.sample import DataError, Source
from coca_scale.data.shards import Mixed, ShardOptions, ShardSource
from coca_scale.data.storage import StorageOptions
from coca_scale.data.synthetic import Shapes
from coca_scale.data.tables import CaptionTable, IndexedSource
from coca_scale.model.preprocess import OPENAI, Preprocess
from coca_scale.recipe.data import DataSection, WeightedShards


def open_source(spec: str | Sequence[str | WeightedShards], data: DataSection, seed: int) -> Source:
    """A source for `data.train` or `data.val`.

    Raises:
        DataError: names nothing, or mixes kinds of sources.
    """
    mixed = _mixed(spec)
    patterns = [pattern for source in mixed for pattern in source.patterns]
    kinds = {_kind(pattern) for pattern in patterns}
    if len(kinds) > 1:
        raise DataError(f"{', '.join(patterns)}: shards, tables and synthetic data do not mix")
    kind = kinds.pop()
    if kind != "table" and data.encoding is not None:
        raise DataError(f"{', '.join(patterns)}: data.encoding is for tables")
    if kind == "shards":
        captions, targets = data.caption_weights
        rules = SampleRules(captions, data.filters, targets=targets)
        options = ShardOptions(seed, data.shuffle_window, data.replacement)
        return ShardSource(mixed, rules, options, storage_options(data))
    weighted = any(source.weight != 1.0 for source in mixed)
    if weighted or data.replacement or data.filters.fields:
        raise DataError(
            f"{', '.join(patterns)}: weights, data.replacement and data.filters.fields are for "
            "shards"
        )
    if kind == "synthetic":
        if len(patterns) > 1:
            raise DataError("give one synthetic:// source, not a list")
        shapes = Shapes.from_url(patterns[0], *data.caption_weights)
        return IndexedSource(shapes, patterns[0], seed)
    if data.captions or data.two_captions:
        raise DataError(
            f"{', '.join(patterns)}: a table has one column of captions; data.captions, "
            "data.contrastive_captions and data.caption_captions are for shards"
        )
    columns = TableOptions(data.image_column, data.caption_column, encoding=data.encoding)
    table = CaptionTable(patterns, columns)
    return IndexedSource(table, ", ".join(patterns), seed)


def train_crop(data: DataSection, image_size: int, preprocess: Preprocess = OPENAI) -> TrainCrop:
    """How training pictures are cropped, and which are too small or too long."""
    limits = (data.filters.min_side, data.filters.max_aspect_ratio)
    return TrainCrop(image_size, data.crop_scale_min, *limits, preprocess)


def storage_options(data: DataSection) -> StorageOptions:
    """How remote shards are read."""
    most = None if data.cache_gigabytes is None else int(data.cache_gigabytes * 1e9)
    folder = None if data.cache_dir is None else Path(data.cache_dir)
    return StorageOptions(data.retries, data.timeout_seconds, folder, most)


def _mixed(spec: str | Sequence[str | WeightedShards]) -> list[Mixed]:
    entries = [spec] if isinstance(spec, str) else spec
    mixed = []
    for entry in entries:
        if isinstance(entry, str):
            mixed.append(Mixed([entry]))
        else:
            patterns = [entry.shards] if isinstance(entry.shards, str) else entry.shards
            mixed.append(Mixed(patterns, entry.weight))
    return mixed


def _kind(pattern: str) -> str:
    if pattern.startswith("synthetic://"):
        return "synthetic"
    return "table" if is_table(pattern) else "shards"
