"""From the files of a sample to a RawSample: which captions, and which samples to leave out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coca_scale.data.images import IMAGE_EXTENSIONS
from coca_scale.data.sample import BadSample, RawSample
from coca_scale.errors import UserError
from coca_scale.recipe.data import DataFilters
from coca_scale.recipe.files import parse_json
from coca_scale.recipe.text import decoded

TEXT, JSON, CLASS = "txt", "json", "cls"
MAX_IMAGE_BYTES = 2**28
MAX_TEXT_BYTES = 2**20
# by extension, what is read of a sample and how much of it at most
LIMITS = {
    **dict.fromkeys(IMAGE_EXTENSIONS, MAX_IMAGE_BYTES),
    TEXT: MAX_TEXT_BYTES,
    JSON: MAX_TEXT_BYTES,
    CLASS: MAX_TEXT_BYTES,
}


class SampleRules:
    """Reads captions and json fields as the recipe says."""

    def __init__(
        self, captions: Mapping[str, float], filters: DataFilters, captions_needed: bool = True
    ) -> None:
        """What makes a sample.

        Args:
            captions: weights by name, `txt`, `cls` (a class number, as in ImageNet's shards) or a
                json field; empty takes .txt, else `caption`.
            filters: of pictures and json fields.
            captions_needed: whether a picture without a caption is a bad sample.
        """
        self._captions_needed = captions_needed
        self._captions = dict(sorted(captions.items(), key=lambda item: -item[1]))
        self._filters = filters

    def sample(self, key: str, files: Mapping[str, bytes | None], shard: str) -> RawSample:
        """The sample in `files`, content by extension.

        Raises:
            BadSample: something is missing, broken, or filtered out.
        """
        image = next((files[e] for e in IMAGE_EXTENSIONS if files.get(e) is not None), None)
        if image is None:
            others = set(files) - {TEXT, JSON, CLASS}
            raise BadSample("wrong_extension" if others else "missing_image", key, shard)
        if not image:
            raise BadSample("broken_image", key, shard)
        text = files.get(TEXT)
        fields: dict[str, Any] = {}
        if self._captions or self._filters.fields or text is None:
            fields = _json_fields(files.get(JSON), key, shard)
        for name, rule in self._filters.fields.items():
            if not rule.accepts(fields.get(name)):
                raise BadSample(f"filtered_{name}", key, shard, filtered=True)
        weights = self._captions or {TEXT if text is not None else "caption": 1.0}
        captions: list[tuple[str, float]] = []
        for name, weight in weights.items():
            whole = name in (TEXT, CLASS)
            found = _whole(files.get(name), key, shard) if whole else _texts(fields.get(name))
            captions += [(caption, weight / len(found)) for caption in found]
        if not captions and self._captions_needed:
            raise BadSample("missing_caption", key, shard)
        sample = RawSample(key, image, tuple(captions), shard)
        if not sample.captions and self._captions_needed:
            raise BadSample("empty_caption", key, shard)
        return sample


def _whole(content: bytes | None, key: str, shard: str) -> list[str]:
    return [] if content is None else [_text(content, key, shard)]


def _text(content: bytes, key: str, shard: str) -> str:
    try:
        return decoded(content)
    except UnicodeError as error:
        raise BadSample("caption_not_utf8", key, shard) from error


def _json_fields(content: bytes | None, key: str, shard: str) -> dict[str, Any]:
    if content is None:
        return {}
    try:
        fields = parse_json(_text(content, key, shard), key)
    except UserError as error:
        raise BadSample("broken_json", key, shard) from error
    if not isinstance(fields, dict):
        raise BadSample("broken_json", key, shard)
    return fields


def _texts(value: Any) -> list[str]:
    """A string or a list of them."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, str)]
