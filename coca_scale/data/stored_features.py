"""A teacher's features of shards, stored once: a file beside each shard's name, and what made them.

`FOLDER/000123.safetensors` has those of `000123.tar`, in fp16. A caption is found by a hash of its
sample's key and its text, so it matters neither in which order a sample has its captions nor which
of them a recipe draws.

    captions  int64 [m]      hashes, sorted
    picture   int32 [m]      row of `images` of the caption's sample
    images    fp16 [n, d]    of un-augmented pictures
    texts     fp16 [m, d]
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from coca_scale.data.sample import BadSample, DataError, RawSample, Source
from coca_scale.data.shards import ShardSource
from coca_scale.recipe.files import read_json_as
from coca_scale.recipe.whole_files import whole_file, write_whole

MANIFEST = "teacher.json"
SUFFIX = ".safetensors"
MISSING = "missing_features"
_DTYPES = {"captions": "I64", "picture": "I32", "images": "F16", "texts": "F16"}
_OPEN_FILES = 256  # of a loader process: maps of files, and an index of each


class TeacherFacts(BaseModel):
    """What has made the features of a folder.

    Attributes:
        model: as it was named.
        identity: digest of its weights and config.
        embed_dim: elements of a feature.
        log_scale: ln of its logit scale.
        precision: that it computed in.
        captions: names of the captions that were read; empty for those of `data pack`.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    model: str
    identity: str
    embed_dim: Annotated[int, Field(ge=1, le=2**20)]
    log_scale: FiniteFloat
    precision: str
    captions: list[str]


class StoredFeatures:
    """Features of a folder, sample by sample.

    Attributes:
        facts: what has made them.
    """

    def __init__(self, folder: Path) -> None:
        """For a folder of features (`are_stored`); raises UserError for a damaged one."""
        self._folder = folder
        self.facts = read_json_as(folder / MANIFEST, TeacherFacts)

    def check(self, source: Source) -> None:
        """See that there are features of all shards.

        Raises:
            DataError: with the number of shards without, or of data that is no shards.
        """
        if not isinstance(source, ShardSource):
            raise DataError(
                f"{self._folder} has features of shards, and this data is none; pack it first "
                "(coca-scale data pack), or let the teacher itself run (loss.distill.teacher=MODEL)"
            )
        there = {path.name for path in self._folder.glob(f"*{SUFFIX}")}
        missing = [url for url in source.urls if feature_file(url) not in there]
        if missing:
            raise DataError(
                f"{self._folder} has no features of {len(missing)} of {len(source.urls)} shards, "
                f"first: {missing[0]}; coca-scale data embed goes on where it stopped"
            )

    def __call__(self, sample: RawSample, caption: str) -> Tensor:
        """fp16 [2, embed_dim] (image, text) of a sample with one of its captions.

        Raises:
            BadSample: they are not there.
            DataError: a damaged file.
        """
        found = _opened(self._folder / feature_file(sample.shard), self.facts.embed_dim)
        pair = found.pair(_hash(sample.key, caption))
        if pair is None:
            raise BadSample(MISSING, sample.key, sample.shard)
        return pair


def are_stored(name: str) -> bool:
    """Whether this is a folder that `coca-scale data embed` has written, and not a model."""
    return (Path(name) / MANIFEST).is_file()


class FeatureFile:
    """Features of one shard; rows are read when they are asked for.

    Attributes:
        pictures: how many it has.
    """

    def __init__(self, path: Path, width: int) -> None:
        """Raises DataError for a damaged file, and for features that are not `width` wide."""
        other = DataError(f"{path}: its features are not those that {MANIFEST} tells of")
        try:
            file = safe_open(path, framework="np")
            slices = {name: file.get_slice(name) for name in _DTYPES}
            shapes = [found.get_shape() for found in slices.values()]
            if {name: found.get_dtype() for name, found in slices.items()} != _DTYPES:
                raise other
            self._captions, self._picture = (file.get_tensor(n) for n in ("captions", "picture"))
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path}: not readable as stored features ({error})") from error
        self._images, self._texts = slices["images"], slices["texts"]
        rows = len(self._captions) if self._captions.ndim else 0
        self.pictures = shapes[2][0] if shapes[2] else 0
        fitting = shapes == [[rows], [rows], [self.pictures, width], [rows, width]]
        if not fitting or not ((self._picture >= 0) & (self._picture < self.pictures)).all():
            raise other

    def pair(self, caption: int) -> Tensor | None:
        """fp16 [2, width] (image, text) of the caption with this hash; None if there is none."""
        row = int(np.searchsorted(self._captions, caption))
        if row == len(self._captions) or self._captions[row] != caption:
            return None
        image = int(self._picture[row])
        rows = [self._images[image : image + 1], self._texts[row : row + 1]]
        return torch.from_numpy(np.concatenate(rows))


@lru_cache(_OPEN_FILES)
def _opened(path: Path, width: int) -> FeatureFile:
    return FeatureFile(path, width)


def feature_file(shard: str) -> str:
    """Name of the file with the features of a shard, whose folder does not matter."""
    return Path(shard.partition("?")[0].rpartition("/")[2]).stem + SUFFIX


def write_facts(folder: Path, facts: TeacherFacts) -> None:
    """Say what makes the features of a folder, or see that it is as in an earlier call.

    Raises:
        DataError: it has features of another teacher.
    """
    known = folder / MANIFEST
    if not known.is_file():
        write_whole(known, json.dumps(facts.model_dump(), indent=1) + "\n")
    elif read_json_as(known, TeacherFacts).model_copy(update={"model": facts.model}) != facts:
        raise DataError(
            f"{folder} holds features of another model, precision or captions; see {known}, and "
            "choose another folder"
        )


def write_features(
    path: Path, samples: Sequence[tuple[str, Sequence[str]]], images: Tensor, texts: Tensor
) -> None:
    """Write the features of a shard; the file is there as a whole or not at all.

    Args:
        path: of the file.
        samples: keys and captions.
        images: [n, d], of each sample.
        texts: [m, d], of all captions, one sample after the other.
    """
    hashes = [_hash(key, caption) for key, captions in samples for caption in captions]
    picture = [row for row, (_, captions) in enumerate(samples) for _ in captions]
    order = np.argsort(np.array(hashes, np.int64), kind="stable")
    tensors = {
        "captions": np.array(hashes, np.int64)[order],
        "picture": np.array(picture, np.int32)[order],
        "images": images.half().numpy(),
        "texts": texts.half().numpy()[order],
    }
    with whole_file(path) as file:
        file.write(save(tensors))


def twice(shards: Iterable[str]) -> str | None:
    """A name that two shards have, under which only one of them can have features."""
    seen: set[str] = set()
    for shard in shards:
        name = feature_file(shard)
        if name in seen:
            return name
        seen.add(name)
    return None


def _hash(key: str, caption: str) -> int:
    digest = blake2b(f"{key}\n{caption}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
