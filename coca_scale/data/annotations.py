"""Annotation files: COCO's (images, annotations) and Karpathy's (images with split and sentences).

Others wrote them: an entry that is not as it should be is skipped and counted, and none leads out
of the folder that a user names for the pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from coca_scale.data.sample import DataError, Skipped
from coca_scale.recipe.files import parse_json
from coca_scale.recipe.text import decoded

MAX_BYTES = 2**31  # COCO's largest has 0.5 GB
Entry = tuple[Path, str] | Skipped
Id = int | str | float


class _CocoImage(BaseModel, strict=True):
    id: Id
    file_name: str


class _CocoCaption(BaseModel, strict=True):
    image_id: Id
    caption: str | None = None


class _Sentence(BaseModel, strict=True):
    raw: str | None = None


class _KarpathyImage(BaseModel, strict=True):
    filename: str
    filepath: str | None = None
    split: str | None = None
    sentences: list[Any] | None = None


Kind = TypeVar("Kind", bound=BaseModel)


def read_annotations(
    path: Path, images: Path, split: str | None, encoding: str | None, captions_needed: bool
) -> Iterator[Entry]:
    """Pictures with a caption each, in the order of the captions; then those without, with "".

    Causes: broken_entry (not what it should be), unsafe_name (absolute, or with ..), duplicate_key
    (two pictures with one id), and where captions are needed missing_caption and missing_image (an
    annotation without its caption or picture).

    Args:
        path: the file.
        images: folder of the pictures.
        split: of a file with several; None takes all.
        encoding: None is UTF-8, or UTF-16 with its mark.
        captions_needed: whether a caption that cannot be used is worth counting.

    Raises:
        DataError: it is no such file, or has nothing of the split.
    """
    content = _content(path, encoding)
    listed, captions = content.get("images"), content.get("annotations")
    if not isinstance(listed, list) or not isinstance(captions, list | None):
        raise DataError(
            f"{path}: neither COCO's annotations nor Karpathy's splits, which have a list of images"
        )
    if "annotations" in content or not any(_is_karpathys(image) for image in listed):
        entries = _coco(str(path), listed, captions or [], captions_needed)
    else:
        entries = _karpathy(str(path), listed, split, captions_needed)
    empty = True
    for entry in entries:
        empty = False
        yield entry if isinstance(entry, Skipped) else (images / entry[0], entry[1])
    if empty and split is not None:
        raise DataError(f"{path}: no pictures of the split {split!r}")


def _content(path: Path, encoding: str | None) -> Mapping[str, Any]:
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path}: over 2 GiB; is it an annotation file?")
    try:
        text = decoded(path.read_bytes(), encoding)
    except UnicodeError as error:
        raise DataError(
            f"{path}: not a text in {encoding or 'UTF-8'}; --encoding says what it is"
        ) from error
    content = parse_json(text, str(path))
    return content if isinstance(content, dict) else {}


def _is_karpathys(image: Any) -> bool:
    return isinstance(image, dict) and "filename" in image


def _coco(
    origin: str, images: Sequence[Any], annotations: Sequence[Any], captions_needed: bool
) -> Iterator[tuple[str, str] | Skipped]:
    names: dict[str, str] = {}
    for number, entry in enumerate(images):
        image = _as(_CocoImage, entry)
        fault = "broken_entry" if image is None else _fault_of(image.file_name)
        if image is not None and fault is None:
            name = names.setdefault(_key(image.id), image.file_name)
            fault = None if name == image.file_name else "duplicate_key"
        if fault is not None:
            yield Skipped(fault, f"{origin}: images[{number}]")
    told: set[str | None] = set()  # pictures with a caption, or whose lack of one is counted
    for number, entry in enumerate(annotations):
        found = _as(_CocoCaption, entry)
        known = None if found is None else names.get(_key(found.image_id))
        if found is not None and found.caption is not None and known is not None:
            told.add(known)
            yield known, found.caption
        elif captions_needed:
            told.add(known)
            cause = "missing_caption" if known is not None else "missing_image"
            yield Skipped(
                "broken_entry" if found is None else cause, f"{origin}: annotations[{number}]"
            )
    yield from ((name, "") for name in names.values() if name not in told)


def _karpathy(
    origin: str, images: Sequence[Any], split: str | None, captions_needed: bool
) -> Iterator[tuple[str, str] | Skipped]:
    for number, entry in enumerate(images):
        place = f"{origin}: images[{number}]"
        image = _as(_KarpathyImage, entry)
        if image is None:
            yield Skipped("broken_entry", place)
            continue
        if split not in (None, image.split):
            continue
        name = str(PurePosixPath(image.filepath or "", image.filename))
        if fault := _fault_of(name):
            yield Skipped(fault, place)
            continue
        sentences = image.sentences or []
        if not (sentences and captions_needed):
            yield name, ""
        for position, item in enumerate(sentences):
            sentence = _as(_Sentence, item)
            if sentence is not None and sentence.raw is not None:
                yield name, sentence.raw
            elif captions_needed:
                cause = "broken_entry" if sentence is None else "missing_caption"
                yield Skipped(cause, f"{place}.sentences[{position}]")


def _as(kind: type[Kind], entry: Any) -> Kind | None:
    """An entry as it should be, or None."""
    try:
        return kind.model_validate(entry)
    except (ValidationError, RecursionError):
        return None


def _key(identity: Id) -> str:
    """One id for 7, 7.0 and "7": tools that write annotations through pandas change its type."""
    whole = isinstance(identity, float) and identity.is_integer()
    return str(int(identity) if whole else identity)


def _fault_of(name: str) -> str | None:
    """Why a picture may not be called like that, if so."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return "unsafe_name"
    return None if path.name else "broken_entry"
