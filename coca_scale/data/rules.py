"""From the files of a sample to a RawSample: which captions, and which samples to leave out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from coca_scale.data.images import IMAGE_EXTENSIONS
from coca_scale.data.sample import EXTENSION, BadSample, RawSample
from coca_scale.errors import UserError
from coca_scale.recipe.data import DataFilters
from coca_scale.recipe.files import parse_json
from coca_scale.recipe.text import decoded, one_line

TEXT, JSON, CLASS = "txt", "json", "cls"
PACKED = "captions"  # field of a .json with all captions of a picture
SENTENCES = ":sentences"  # behind the name of what holds texts: each sentence by itself
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
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
        targets: Mapping[str, float] | None = None,
    ) -> None:
        """What makes a sample.

        Args:
            captions: weights by name, `txt` (a caption per line), `cls` (a class number, as in
                ImageNet's shards) or a json field, each of them with `:sentences` for the sentences
                of its texts; several texts share the weight of their name. Empty takes .txt, else
                `caption`.
            filters: of pictures and json fields.
            captions_needed: whether a picture without a caption is a bad sample; if not, what is
                wrong with a caption leaves its picture without it.
            every_caption: where `captions` is empty, take all that `data pack` has listed.
            targets: as `captions`, of what a model learns to write; None: the same.
        """
        self._every_caption = every_caption
        self._captions_needed = captions_needed
        self._captions = _heaviest_first(captions)
        self._targets = None if targets is None else _heaviest_first(targets)
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
        texts = (files, fields, key, shard)
        captions = self._weighted(self._captions, *texts)
        targets = None if self._targets is None else self._weighted(self._targets, *texts)
        sample = RawSample(key, image, captions, shard, targets)
        if not (sample.captions and sample.targets != ()) and self._captions_needed:
            raise BadSample("empty_caption", key, shard)
        return sample

    def _fields(self, files: Mapping[str, bytes | None], key: str, shard: str) -> dict[str, Any]:
        """Of the .json, as far as it matters; a broken one is no fault where it does not."""
        wanted = self._captions or self._targets or files.get(TEXT) is None
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
        weights: Mapping[str, float],
        files: Mapping[str, bytes | None],
        fields: Mapping[str, Any],
        key: str,
        shard: str,
    ) -> tuple[tuple[str, float], ...]:
        """Captions as they are written, with their weights.

        Raises:
            BadSample: one is broken, or there is none, and captions are needed.
        """

        def texts(name: str) -> list[str]:
            if name in (TEXT, CLASS):
                return _lines(files.get(name), key, shard)
            return _texts(fields.get(name))

        try:
            captions = weighted(self._names(weights, fields, files.get(TEXT)), texts)
        except BadSample:
            if self._captions_needed:
                raise
            return ()
        if not captions and self._captions_needed:
            raise BadSample("missing_caption", key, shard)
        return captions

    def _names(
        self, weights: Mapping[str, float], fields: Mapping[str, Any], text: bytes | None
    ) -> Mapping[str, float]:
        """Names of what holds captions."""
        if weights:
            return weights
        if self._every_caption and _are_packed(fields.get(PACKED), text):
            return {PACKED: 1.0}
        return {TEXT if text is not None else "caption": 1.0}


def weighted(
    weights: Mapping[str, float], texts: Callable[[str], list[str]]
) -> tuple[tuple[str, float], ...]:
    """Captions with sampling weights; several of one name have equal shares of its weight.

    Args:
        weights: by name, which may ask for `:sentences`.
        texts: of a name, as they are written.
    """
    captions: list[tuple[str, float]] = []
    for name, weight in weights.items():
        found = texts(name.removesuffix(SENTENCES))
        if name.endswith(SENTENCES):
            found = [sentence for text in found for sentence in sentences_of(text)]
        captions += [(caption, weight / len(found)) for caption in found]
    return tuple(captions)


def sentences_of(text: str) -> list[str]:
    """Its sentences: each ends with `.`, `!` or `?` before a space, or where the text does."""
    return _SENTENCE_END.split(text.strip())


def _heaviest_first(weights: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(weights.items(), key=lambda item: -item[1]))


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
