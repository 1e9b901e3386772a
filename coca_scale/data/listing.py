"""Picture files with their captions, as people keep them: folders, tables, annotation files.

Whatever a list names is either a picture or left out with a cause; nothing is forgotten.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coca_scale.data.annotations import read_annotations
from coca_scale.data.local_files import read_picture, read_side_car
from coca_scale.data.naming import (
    format_cause,
    is_annotation_file,
    is_companion,
    is_picture,
    is_side_car,
    is_table,
    undecodable_cause,
)
from coca_scale.data.rows import TableOptions, read_rows
from coca_scale.data.rules import captions_of_lines
from coca_scale.data.sample import (
    LINKED_FOLDER,
    BadSample,
    DataError,
    RawSample,
    Skipped,
    causes_text,
)
from coca_scale.recipe.text import decoded, known_encoding, one_line


@dataclass(frozen=True)
class ListOptions:
    """How to read a list.

    Attributes:
        images: where the pictures of an annotation file are.
        image_column: of a table, with the path, from the folder of the table.
        caption_column: of a table.
        split: of an annotation file with several, as Karpathy's; None takes all.
        first_line: of a side-car is its only caption; others are translations, sources, notes.
        encoding: of captions, tables and annotation files; None is UTF-8, or UTF-16 with its mark.
    """

    images: Path | None = None
    image_column: str = "filepath"
    caption_column: str = "title"
    split: str | None = None
    first_line: bool = False
    encoding: str | None = None

    def __post_init__(self) -> None:
        """Raises UserError for an encoding that there is not."""
        if self.encoding is not None:
            known_encoding(self.encoding)


@dataclass(frozen=True)
class ListedPicture:
    """An image file with its captions."""

    path: Path
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Listing:
    """What a list names.

    Attributes:
        pictures: with all their captions, in order of first appearance.
        skipped: what was left out, and why.
    """

    pictures: Sequence[ListedPicture]
    skipped: Sequence[Skipped] = ()


class PictureFiles:
    """Listed pictures as a collection of samples, behind them what was left out."""

    def __init__(self, listing: Listing) -> None:
        self._pictures, self._skipped = listing.pictures, listing.skipped

    def __len__(self) -> int:
        return len(self._pictures) + len(self._skipped)

    def __getitem__(self, index: int) -> RawSample:
        """The sample; raises BadSample if it cannot be used."""
        if index >= len(self._pictures):
            raise BadSample(*self._skipped[index - len(self._pictures)])
        picture = self._pictures[index]
        captions = tuple((caption, 1.0) for caption in picture.captions)
        return RawSample(str(picture.path), read_picture(picture.path), captions)


def list_pictures(source: Path, options: ListOptions, captions_needed: bool = True) -> Listing:
    """Image files with all their captions, in order of first appearance.

    A folder has them in .txt side-cars, one per line; a .csv or .tsv in rows; a .json is COCO's
    (images, annotations) or Karpathy's (images with split and sentences). Where no
    captions are needed, what is wrong with one leaves its picture without it.

    Raises:
        DataError: none of these, without pictures, or without the captions that are needed.
    """
    entries: Iterable[tuple[Path, str] | Skipped]
    if source.is_dir():
        entries = _folder_entries(source, options, captions_needed)
    elif is_table(source):
        columns = (options.image_column, options.caption_column)
        rows = read_rows(source, TableOptions(*columns, captions_needed, options.encoding))
        entries = (r if isinstance(r, Skipped) else (Path(r[0]), r[1]) for r in rows)
    elif is_annotation_file(source) and source.is_file():
        if options.images is None:
            raise DataError(f"{source}: say where the pictures are with --images DIR")
        entries = read_annotations(
            source, options.images, options.split, options.encoding, captions_needed
        )
    elif not source.exists():
        raise DataError(f"{source}: no such file or folder")
    else:
        raise DataError(f"{source}: give a folder, a .csv or .tsv file, or a COCO .json file")
    captions: dict[Path, list[str]] = {}
    skipped = []
    for entry in entries:
        if isinstance(entry, Skipped):
            skipped.append(entry)
            continue
        path, caption = entry
        known = captions.setdefault(path, [])
        text = one_line(caption)
        if text and text not in known:
            known.append(text)
    listing = Listing([ListedPicture(p, tuple(texts)) for p, texts in captions.items()], skipped)
    _see_that_there_is_something(source, listing, captions_needed)
    return listing


@dataclass(frozen=True)
class FolderContent:
    """What lies in a folder and in the folders in it.

    Attributes:
        pictures: sorted.
        side_cars: caption files by the path of their pictures without its suffix.
        skipped: what else lies there, sorted.
    """

    pictures: Sequence[Path]
    side_cars: Mapping[Path, Path]
    skipped: Sequence[Skipped]


def look_into(folder: Path) -> FolderContent:
    """Find the pictures of a folder.

    Links to folders are not followed: they can lead in circles, or out.
    """
    pictures: list[Path] = []
    side_cars: dict[Path, Path] = {}
    skipped: list[Skipped] = []

    def unreadable(error: OSError) -> None:
        skipped.append(Skipped("unreadable_folder", str(error.filename)))

    for root, folders, files in os.walk(folder, onerror=unreadable):
        for path in (Path(root, name) for name in sorted(files)):
            if is_picture(path):
                pictures.append(path)
            elif is_side_car(path):
                side_cars[path.with_suffix("")] = path
            elif not is_companion(path):
                skipped.append(Skipped(format_cause(path), str(path)))
        links = (path for name in folders if (path := Path(root, name)).is_symlink())
        skipped += (Skipped(LINKED_FOLDER, str(path)) for path in links)
    return FolderContent(sorted(pictures), side_cars, sorted(skipped))


def _folder_entries(
    folder: Path, options: ListOptions, captions_needed: bool
) -> Iterator[tuple[Path, str] | Skipped]:
    content = look_into(folder)
    yield from content.skipped
    for picture in content.pictures:
        side_car = content.side_cars.get(picture.with_suffix(""))
        try:
            captions = [] if side_car is None else _side_car_captions(side_car, options)
        except BadSample as bad:
            if captions_needed:
                yield bad.skipped
                continue
            captions = []
        yield from ((picture, caption) for caption in captions or [""])


def _side_car_captions(side_car: Path, options: ListOptions) -> list[str]:
    try:
        text = decoded(read_side_car(side_car), options.encoding)
    except UnicodeError as error:
        raise BadSample(undecodable_cause(options.encoding), str(side_car)) from error
    return captions_of_lines(text)[: 1 if options.first_line else None]


def _see_that_there_is_something(source: Path, listing: Listing, captions_needed: bool) -> None:
    causes = Counter(skipped.cause for skipped in listing.skipped)
    found = f" (left out: {causes_text(causes)})" if causes else ""
    if not listing.pictures:
        raise DataError(f"{source}: no pictures in it that can be used{found}")
    if captions_needed and not any(picture.captions for picture in listing.pictures):
        count = len(listing.pictures)
        raise DataError(f"{source}: {count} pictures and no captions, which are needed{found}")
