"""Zero-shot classification: a class is the mean of the features of sentences about it.

As Radford et al. 2021, section 3.1.4, and open_clip's `build_zero_shot_classifier`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from coca_scale.data.listing import ListedPicture, Listing, ListOptions, look_into
from coca_scale.data.rules import CLASS
from coca_scale.data.sample import DataError
from coca_scale.evaluation.encoder import Encoder, Feeding
from coca_scale.evaluation.pictures import (
    InputPictures,
    Part,
    Picture,
    is_picture_folder,
    listed_part,
    open_pictures,
)
from coca_scale.evaluation.results import Kind, Result, Score
from coca_scale.evaluation.rounds import PictureRounds, encode_pictures, encode_texts
from coca_scale.model.coca import unit
from coca_scale.openclip.alone import imagenet_names, open_clip_module
from coca_scale.recipe.data import DataSection
from coca_scale.recipe.files import read_text
from coca_scale.recipe.text import one_line

_openclip = open_clip_module("zero_shot_metadata")

IMAGENET = "imagenet"
TEMPLATES: dict[str, Sequence[Callable[[str], str]]] = {
    "openai": _openclip.OPENAI_IMAGENET_TEMPLATES,
    "simple": _openclip.SIMPLE_IMAGENET_TEMPLATES,
}
_WORDNET_ID = re.compile(r"(n\d{8})(?:[-_. ]+(.*))?")  # with a name behind it in Stanford's dogs


KIND = Kind(
    "zeroshot",
    "zero-shot-image-classification",
    {
        "top_1": Score("zero-shot top-1", headline=True, charted=True),
        "top_5": Score("zero-shot top-5"),
        "mean_per_class": Score("zero-shot mean top-1 of classes"),
    },
    prefix="zeroshot_",
)


@dataclass(frozen=True)
class ZeroShot:
    """Pictures are told apart into classes by sentences about these.

    Attributes:
        labelled: the pictures and the classes.
    """

    labelled: Labelled

    def run(self, encoder: Encoder, feeding: Feeding) -> Result:
        """As of `Evaluator`."""
        labelled, world = self.labelled, encoder.world
        rounds = PictureRounds(InputPictures(labelled.parts), encoder, feeding)
        rows: list[Tensor] = []
        labels_here: list[int] = []
        for batch in rounds:
            labels_here += world.agree(partial(labelled.labels, batch))
            rows.append(encode_pictures(encoder, batch))
        images, labels = rounds.collect_rows(rows), torch.tensor(rounds.collect(labels_here))
        texts = encode_texts(encoder, labelled.classes.prompts(), feeding)

        def score() -> Result:
            weights = classifier(texts.to(world.device), labelled.classes)
            scores = accuracy(images.to(world.device), weights, labels.to(world.device))
            counts = {"pictures": len(labels), "classes": len(labelled.classes.names)}
            return Result(KIND, scores, counts, bad=rounds.bad)

        return world.on_first(score)


@dataclass(frozen=True)
class Classes:
    """What pictures are told apart into.

    Attributes:
        names: of the classes.
        templates: sentences about one.
    """

    names: Sequence[str]
    templates: Sequence[Callable[[str], str]]

    def prompts(self) -> list[str]:
        """All sentences, class after class."""
        return [template(name) for name in self.names for template in self.templates]


@dataclass(frozen=True)
class Labelled:
    """Pictures whose first caption is the number of their class.

    Attributes:
        parts: the pictures.
        classes: what they are told apart into.
    """

    parts: Sequence[Part]
    classes: Classes

    def labels(self, pictures: Sequence[Picture]) -> list[int]:
        """Their classes; raises DataError for one that there is not."""
        return [self.label(picture) for picture in pictures]

    def label(self, picture: Picture) -> int:
        """Its class; raises DataError for one that there is not."""
        label = picture.captions[0] if picture.captions else ""
        if not label.isdecimal() or int(label) >= len(self.classes.names):
            last = len(self.classes.names) - 1
            raise DataError(f"{picture.key}: class {label!r} is none of 0 … {last}")
        return int(label)


def open_labelled(
    data: Sequence[str], section: DataSection, classnames: str | None, templates: str
) -> Labelled:
    """Pictures in a folder of class folders, or of shards with .cls files.

    Args:
        data: one folder, or shards.
        section: how remote shards are read.
        classnames: as of `make_classes`.
        templates: as of `make_classes`.

    Raises:
        DataError: neither of these, or class names that do not fit.
    """
    if len(data) == 1 and is_picture_folder(Path(data[0])):
        folders, listing = class_folders(Path(data[0]))
        parts = [listed_part(listing, data[0])]
        return Labelled(parts, make_classes(classnames, templates, folders))
    by_class = section.model_copy(update={"captions": {CLASS: 1.0}})
    parts = open_pictures(data, by_class, ListOptions(), captions_needed=True)
    return Labelled(parts, make_classes(classnames, templates, None))


def make_classes(classnames: str | None, templates: str, folders: Sequence[str] | None) -> Classes:
    """Classes by what a user names.

    Args:
        classnames: `imagenet`, or a file with a name per line; None takes the folders' names, and
            those of ImageNet's classes where folders have their WordNet ids.
        templates: `openai` (80 sentences), `simple` (7), or a file with a sentence per line that
            has {} in the name's place.
        folders: names of the class folders, None if the data are no folders.

    Raises:
        DataError: a file that is missing or empty, as many names as folders are not given, or a
            folder has the WordNet id of something else.
    """
    if classnames is None and folders is None:
        raise DataError("shards do not name their classes: give --classnames imagenet, or a file")
    if classnames is None:
        names: Sequence[str] = _names_of(folders or ())
    elif classnames == IMAGENET:
        ids = imagenet_names()
        some = folders is not None and set(folders) <= ids.keys()
        names = _names_of(folders or ()) if some else list(ids.values())
    else:
        names = _read_lines(classnames)
    if folders is not None and len(names) != len(folders):
        raise DataError(f"{len(names)} class names for {len(folders)} class folders")
    if templates in TEMPLATES:
        return Classes(names, TEMPLATES[templates])
    sentences = _read_lines(templates)
    if wrong := [s for s in sentences if "{}" not in s]:
        raise DataError(f"{templates}: no {{}} in {wrong[0]!r}")
    return Classes(names, [_filler(sentence) for sentence in sentences])


def class_folders(folder: Path) -> tuple[list[str], Listing]:
    """Names of the folders in a folder, sorted, and the pictures in each with its number.

    Raises:
        DataError: no folders, or none with pictures.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    contents = [look_into(folder / name) for name in names]
    pictures = [
        ListedPicture(path, (str(number),))
        for number, content in enumerate(contents)
        for path in content.pictures
    ]
    if not pictures:
        raise DataError(f"{folder}: no folders with pictures in it, one per class")
    return names, Listing(pictures, [left_out for c in contents for left_out in c.skipped])


def classifier(features_of_prompts: Tensor, classes: Classes) -> Tensor:
    """Unit features [C·T, d] of all prompts → unit features of the classes, [C, d]."""
    return unit(features_of_prompts.unflatten(0, (len(classes.names), -1)).mean(1))


def accuracy(image_features: Tensor, weights: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of images whose class is the likeliest, among the 5 likeliest, and the mean of the
    former over classes.

    Args:
        image_features: [N, d].
        weights: features of the classes, [C, d].
        labels: int64 [N].
    """
    most = min(5, len(weights))
    best = torch.cat([(x @ weights.T).topk(most).indices for x in image_features.split(1024)])
    right = best == labels[:, None]
    first = right[:, 0].double()
    of_class = torch.zeros(len(weights), dtype=torch.float64, device=labels.device)
    count = labels.bincount(minlength=len(weights))
    per_class = of_class.index_add(0, labels, first)[count > 0] / count[count > 0]
    return {
        "top_1": float(first.mean()),
        "top_5": float(right.any(1).double().mean()),
        "mean_per_class": float(per_class.mean()),
    }


def _names_of(folders: Sequence[str]) -> list[str]:
    """Of classes by their folders: a WordNet id stands for a name, anything else is one."""
    ids, names = imagenet_names(), []
    for folder in folders:
        match = _WORDNET_ID.fullmatch(folder)
        name = folder if match is None else match[2] or ids.get(match[1])
        if name is None:
            raise DataError(
                f"the folder {folder} has the WordNet id of none of ImageNet's 1000 classes; give "
                "--classnames FILE, with a name per line in the order of the sorted folders"
            )
        names.append(one_line(name.replace("_", " ")))
    return names


def _filler(sentence: str) -> Callable[[str], str]:
    return lambda name: sentence.replace("{}", name)


def _read_lines(name: str) -> list[str]:
    path = Path(name)
    if not path.is_file():
        raise DataError(f"{name}: no such file")
    lines = [one_line(line) for line in read_text(path).split("\n")]
    lines = [line for line in lines if line]
    if not lines:
        raise DataError(f"{name}: empty")
    return lines
