"""Picture files with their captions, as people keep them: folders, tables, annotation files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coca_scale.data.images import IMAGE_EXTENSIONS
from coca_scale.data.rules import captions_of_lines
from coca_scale.data.sample import BadSample, DataError, RawSample
from coca_scale.data.tables import TABLE_SUFFIXES, read_table
from coca_scale.recipe.files import read_json
from coca_scale.recipe.text import one_line

ANNOTATIONS = ".json"
_SUFFIXES = {f".{extension}" for extension in IMAGE_EXTENSIONS}


@dataclass(frozen=True)
class ListOptions:
    """How to read a list.

    Attributes:
        images: where the pictures of an annotation file are.
        image_column: of a table, with the path, from the folder of the table.
        caption_column: of a table.
        split: of an annotation file with several, as Karpathy's; None takes all.
        first_line: of a side-car is its only caption; others are translations, sources, notes.
    """

    images: Path | None = None
    image_column: str = "filepath"
    caption_column: str = "title"
    split: str | None = None
    first_line: bool = False


@dataclass(frozen=True)
class ListedPicture:
    """An image file with its captions."""

    path: Path
    captions: tuple[str, ...]


class PictureFiles:
    """Listed pictures as a collection of samples."""

    def __init__(self, pictures: Sequence[ListedPicture]) -> None:
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> RawSample:
        """The sample; raises BadSample if it is not there."""
        picture = self._pictures[index]
        name = str(picture.path)
        try:
            content = picture.path.read_bytes()
        except OSError as error:
            raise BadSample("missing_image", name) from error
        return RawSample(name, content, tuple((caption, 1.0) for caption in picture.captions))


def is_picture(path: Path) -> bool:
    """Whether its name is that of a picture."""
    return path.suffix.lower() in _SUFFIXES


def list_pictures(
    source: Path, options: ListOptions, captions_needed: bool = True
) -> list[ListedPicture]:
    """Image files with all their captions, in order of first appearance.

    A folder has them in .txt side-cars, one per line; a .csv or .tsv in rows; a .json is COCO's
    (images, annotations) or Karpathy's (images with split and sentences).

    Raises:
        DataError: none of these, or without content.
    """
    pairs: Iterable[tuple[Path, str]]
    if source.is_dir():
        pairs = _folder_pairs(source, options.first_line)
    elif source.suffix in TABLE_SUFFIXES:
        columns = (options.image_column, options.caption_column)
        rows = read_table(source, *columns, captions_needed)
        pairs = ((Path(path), caption) for path, caption in rows)
    elif source.suffix == ANNOTATIONS and source.is_file():
        pairs = _annotated_pairs(source, options)
    else:
        raise DataError(f"{source}: give a folder, a .csv or .tsv file, or a COCO .json file")
    captions: dict[Path, list[str]] = {}
    for path, caption in pairs:
        known = captions.setdefault(path, [])
        text = one_line(caption)
        if text and text not in known:
            known.append(text)
    if not captions:
        raise DataError(f"{source}: no pictures with captions in it")
    return [ListedPicture(path, tuple(texts)) for path, texts in captions.items()]


def _folder_pairs(folder: Path, first_line: bool) -> Iterator[tuple[Path, str]]:
    images = sorted(p for p in folder.rglob("*") if is_picture(p))
    if not images:
        raise DataError(f"{folder}: no images ({', '.join(sorted(_SUFFIXES))}) in it")
    for image in images:
        caption_file = image.with_suffix(".txt")
        text = caption_file.read_text(errors="replace") if caption_file.is_file() else ""
        for caption in captions_of_lines(text)[: 1 if first_line else None]:
            yield image, caption


def _annotated_pairs(path: Path, options: ListOptions) -> list[tuple[Path, str]]:
    if options.images is None:
        raise DataError(f"{path}: say where the pictures are with --images DIR")
    try:
        content = read_json(path)
        if "annotations" in content:
            found = list(_coco(content))
        else:
            found = list(_karpathy(content["images"], options.split))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: neither COCO's caption annotations nor Karpathy's splits ({error!r})"
        ) from error
    if not found and options.split is not None:
        raise DataError(f"{path}: no pictures of the split {options.split!r}")
    return [(options.images / name, caption) for name, caption in found]


def _coco(content: Any) -> Iterable[tuple[str, str]]:
    names = {image["id"]: image["file_name"] for image in content["images"]}
    return ((names[a["image_id"]], a["caption"]) for a in content["annotations"])


def _karpathy(images: Any, split: str | None) -> Iterator[tuple[str, str]]:
    for image in images:
        if split is None or image["split"] == split:
            name = str(Path(image.get("filepath", ""), image["filename"]))
            for sentence in image["sentences"]:
                yield name, sentence["raw"]
