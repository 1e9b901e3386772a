"""From the files of a sample to a RawSample: which captions, and which samples to leave out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coca_scale.data.images import IMAGE_EXTENSIONS
from coca_scale.data.sample import EXTENSION, BadSample, RawSample
from coca_scale.errors import UserError
from coca_scale.recipe.data import DataFilters
from coca_scale.recipe.files import parse_json
from coca_scale.recipe.text import decoded, one_line

TEXT, JSON, CLASS = "txt", "json", "cls"
PACKED = "captions"  # field of a .json with all captions of a picture
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
        self,
        captions: Mapping[str, float],
        filters: DataFilters,
        captions_needed: bool = True,
        every_caption: bool = False,
    ) -> None:
        """What makes a sample.

        Args:
            captions: weights by name, `txt` (a caption per line), `cls` (a class number, as in
                ImageNet's shards) or a json field; several texts share the weight of their name.
                Empty takes .txt, else `caption`.
            filters: of pictures and json fields.
            captions_needed: whether a picture without a caption is a bad sample; if not, what is
                wrong with a caption leaves its picture without it.
            every_caption: where `captions` is empty, take all that `data pack` has listed.
        """
        self._every_caption = every_caption
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
            raise BadSample(EXTENSION if others else "missing_image", key, shard)
        if not image:
            raise BadSample("broken_image", key, shard)
        fields = self._fields(files, key, shard)
        for name, rule in self._filters.fields.items():
            if not rule.accepts(fields.get(name)):
                raise BadSample(f"filtered_{name}", key, shard, filtered=True)
        try:
            captions = self._weighted(files, fields, key, shard)
        except BadSample:
            if self._captions_needed:
                raise
            captions = []
        if not captions and self._captions_needed:
            raise BadSample("missing_caption", key, shard)
        sample = RawSample(key, image, tuple(captions), shard)
        if not sample.captions and self._captions_needed:
            raise BadSample("empty_caption", key, shard)
        return sample

    def _fields(self, files: Mapping[str, bytes | None], key: str, shard: str) -> dict[str, Any]:
        """Of the .json, as far as it matters; a broken one is no fault where it does not."""
        wanted = self._captions or files.get(TEXT) is None
        needed = self._filters.fields or (wanted and self._captions_needed)
        if not (needed or wanted) and not self._every_caption:
            return {}
        try:
            return _json_fields(files.get(JSON), key, shard)
        except BadSample:
            if needed:
                raise
            return {}

    def _weighted(
        self,
        files: Mapping[str, bytes | None],
        fields: Mapping[str, Any],
        key: str,
        shard: str,
    ) -> list[tuple[str, float]]:
        """Captions as they are written, several of one name with equal shares of its weight."""
        captions: list[tuple[str, float]] = []
        for name, weight in self._weights(fields, files.get(TEXT)).items():
            if name in (TEXT, CLASS):
                found = _lines(files.get(name), key, shard)
            else:
                found = _texts(fields.get(name))
            captions += [(caption, weight / len(found)) for caption in found]
        return captions

    def _weights(self, fields: Mapping[str, Any], text: bytes | None) -> Mapping[str, float]:
        """Names of what holds captions."""
        if self._captions:
            return self._captions
        if self._every_caption and _are_packed(fields.get(PACKED), text):
            return {PACKED: 1.0}
        return {TEXT if text is not None else "caption": 1.0}


def _are_packed(listed: Any, text: bytes | None) -> bool:
    """Whether `data pack` has listed them: the first is what it has put into the .txt as well."""
    texts = _texts(listed)
    if not texts or text is None:
        return bool(texts)
    return one_line(text.decode("utf-8", "replace")) == one_line(texts[0])


def captions_of_lines(text: str) -> list[str]:
    """Captions of a .txt: one per line, as CLIP_benchmark writes and reads them.

    Lines without words are left out; of a text that has no others, one is left.
    """
    return [line for line in text.splitlines() if line.strip()] or [""]


def _lines(content: bytes | None, key: str, shard: str) -> list[str]:
    return [] if content is None else captions_of_lines(_text(content, key, shard))


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
