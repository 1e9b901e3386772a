"""Write WebDataset shards from a folder, a table or a COCO annotation file."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from pydantic import BaseModel
from webdataset import TarWriter

from coca_scale.data.images import MIN_SIDE_PIXELS, decode_image, image_format
from coca_scale.data.listing import ListedPicture, Listing, ListOptions, list_pictures
from coca_scale.data.local_files import read_picture
from coca_scale.data.manifest import MANIFEST, Count
from coca_scale.data.sample import BadSample, DataError, Skipped, causes_text
from coca_scale.data.workers import working
from coca_scale.errors import UserError
from coca_scale.recipe.files import read_json, read_json_as, sha256_of
from coca_scale.recipe.lock import Lock, folder_claim, held
from coca_scale.recipe.whole_files import whole_file, write_whole

JPEG_QUALITY = 95
EXTENSION_OF = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
PLAN = "pack.json"
BAD_LIST = "bad_samples.jsonl"
T = TypeVar("T")


class _Shard(BaseModel):
    name: str
    samples: Count
    bytes: Count
    sha256: str


class _Receipt(BaseModel):
    """That a shard is complete; None is one in which nothing could be used."""

    bad: list[tuple[str, str]]
    shard: _Shard | None


class _Manifest(BaseModel):
    """What was packed, and samples that were left out by cause."""

    samples: Count
    bad: dict[str, Count]
    shards: list[_Shard]


@dataclass(frozen=True)
class PackOptions(ListOptions):
    """How to read the source and write the shards.

    Attributes:
        shard_samples: most samples of a shard.
        max_side: larger pictures are scaled down to it, in pixels.
    """

    shard_samples: int = 10000
    max_side: int | None = None


@dataclass(frozen=True)
class PackResult:
    """What was written: samples, shards, and skipped samples by cause."""

    samples: int
    shards: int
    bad: Counter[str]


Progress = Callable[[int, int], None]


def pack(
    source: Path,
    out: Path,
    options: PackOptions,
    workers: int = 1,
    progress: Progress | None = None,
) -> PackResult:
    """Write shards and `manifest.json` into `out`.

    Which picture goes into which shard is settled before the first is written, so shards are
    equally full and independent: `workers` processes write them, and a second call after an
    interruption writes those that are missing. A shard has its final name only when it is
    complete, and the manifest comes last.

    Args:
        source: folder with .txt side-cars, .csv/.tsv, or COCO .json.
        out: folder for the shards.
        options: how to read and write.
        workers: processes.
        progress: called with the number of pictures done and their total.

    Raises:
        DataError: the source cannot be read, or nothing in it can be used, or `out` holds shards of
            something else.
        UserError: another process packs into `out`.
    """
    listing = _captioned(source, options)
    with held(folder_claim(out)) as lock:
        return _pack(lock, listing, source, out, options, workers, progress)


def pack_split(
    source: Path,
    out: Path,
    options: PackOptions,
    hold_out: int,
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, PackResult]:
    """Write every `hold_out`-th picture into `out`/val and the others into `out`/train.

    A picture is in one of them with all its captions; what the list itself leaves out is counted
    in train. The rest is as in `pack`; val comes first, so after an interruption it may be complete
    already.
    """
    listing = _captioned(source, options)
    pictures = listing.pictures
    few = Listing(pictures[::hold_out])
    others = [picture for index, picture in enumerate(pictures) if index % hold_out]
    rest = Listing(others, listing.skipped)
    if not others:
        raise DataError(f"{source}: has one picture, so none can be held out")
    with held(folder_claim(out)) as lock:
        if (out / "val" / MANIFEST).exists() and not (out / "train" / MANIFEST).exists():
            validation = _packed(out / "val")
        else:
            validation = _pack(lock, few, source, out / "val", options, workers, progress)
        return {
            "train": _pack(lock, rest, source, out / "train", options, workers, progress),
            "val": validation,
        }


def _captioned(source: Path, options: PackOptions) -> Listing:
    """A list, in which a picture without a caption is left out."""
    listing = list_pictures(source, options)
    without = (Skipped("missing_caption", str(p.path)) for p in listing.pictures if not p.captions)
    return Listing([p for p in listing.pictures if p.captions], [*listing.skipped, *without])


def _packed(out: Path) -> PackResult:
    """What an earlier call has written."""
    found = _read(out / MANIFEST, _Manifest)
    return PackResult(found.samples, len(found.shards), Counter(found.bad))


def _pack(
    lock: Lock,
    listing: Listing,
    source: Path,
    out: Path,
    options: PackOptions,
    workers: int,
    progress: Progress | None,
) -> PackResult:
    if (out / MANIFEST).exists():
        raise DataError(f"{out}: holds packed shards already; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob("*.tmp"):
        left.unlink()  # by a call that was killed
    pictures = listing.pictures
    _settle(out, source, options, pictures)
    several = any(len(picture.captions) > 1 for picture in pictures)
    count = -(-len(pictures) // options.shard_samples)
    bounds = [number * len(pictures) // count for number in range(count + 1)]
    done = 0
    missing = []
    for number in range(count):
        receipt = _receipt(out, number)
        if receipt.is_file():
            _read(receipt, _Receipt)
            done += bounds[number + 1] - bounds[number]
        else:
            missing.append(number)
    if progress is not None:
        progress(done, len(pictures))
    with working(min(workers, max(1, len(missing)))) as pool:
        jobs = {}
        for number in missing:
            part = pictures[bounds[number] : bounds[number + 1]]
            job = pool.submit(_write_shard, out, number, bounds[number], part, options, several)
            jobs[job] = len(part)
        for job in as_completed(jobs):
            job.result()
            lock.require()
            done += jobs[job]
            if progress is not None:
                progress(done, len(pictures))
    lock.require()
    return _finish(out, source, count, listing.skipped)


def _settle(
    out: Path, source: Path, options: PackOptions, pictures: Sequence[ListedPicture]
) -> None:
    """Write down what is packed here, or see that it is the same as before the interruption."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(repr((str(picture.path), picture.captions)).encode())
    facts = {name: str(value) for name, value in asdict(options).items()}
    plan = {"source": str(source.resolve()), "options": facts, "pictures": digest.hexdigest()}
    path = out / PLAN
    if not path.is_file():
        write_whole(path, json.dumps(plan))
    elif read_json(path) != plan:
        raise DataError(
            f"{out}: holds part of a pack of other pictures or options; choose another folder, or "
            "delete this one"
        )


def _receipt(out: Path, number: int) -> Path:
    return out / f"shard-{number:06d}.json"


def _write_shard(
    out: Path,
    number: int,
    first: int,
    pictures: Sequence[ListedPicture],
    options: PackOptions,
    several: bool,
) -> None:
    """Write one shard, and then the receipt that says it is complete.

    `several` says that some picture has more than one caption, so all list theirs.
    """
    path = out / f"shard-{number:06d}.tar"
    bad: list[tuple[str, str]] = []
    count = 0
    with whole_file(path) as file, TarWriter(file, mtime=0) as writer:
        for index, picture in enumerate(pictures):
            try:
                writer.write(
                    {"__key__": f"{first + index:09d}", **_files_of(picture, options, several)}
                )
                count += 1
            except BadSample as error:
                bad.append((error.cause, str(picture.path)))
    receipt: dict[str, Any] = {"bad": bad, "shard": None}
    if count:
        about = {"samples": count, "bytes": path.stat().st_size}
        receipt["shard"] = {"name": path.name, **about, "sha256": sha256_of(path)}
    else:
        path.unlink()
    write_whole(_receipt(out, number), json.dumps(receipt))


def _files_of(picture: ListedPicture, options: PackOptions, several: bool) -> dict[str, bytes]:
    extension, data = _image_bytes(picture.path, options.max_side)
    files = {extension: data, "txt": picture.captions[0].encode("utf-8", "replace")}
    if several:
        files["json"] = json.dumps({"captions": picture.captions}).encode()
    return files


def _image_bytes(path: Path, max_side: int | None) -> tuple[str, bytes]:
    """The file as it is, or scaled down to `max_side` and written as JPEG."""
    data = read_picture(path)
    image = decode_image(data, str(path))
    extension = EXTENSION_OF.get(image_format(data, str(path)))
    if extension is not None and (max_side is None or max(image.size) <= max_side):
        return extension, data
    if max_side is not None:
        image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
        if min(image.size) < MIN_SIDE_PIXELS:
            raise BadSample("tiny_image", str(path))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "jpg", buffer.getvalue()


def _finish(out: Path, source: Path, count: int, skipped: Sequence[Skipped]) -> PackResult:
    """Put the receipts together as the manifest, with what the list had left out."""
    receipts = [_read(_receipt(out, number), _Receipt) for number in range(count)]
    bad = [entry for receipt in receipts for entry in receipt.bad]
    bad += [(left_out.cause, left_out.key) for left_out in skipped]
    causes = Counter(cause for cause, _ in bad)
    shards = [receipt.shard for receipt in receipts if receipt.shard is not None]
    if bad:
        lines = (json.dumps({"cause": cause, "key": key}) + "\n" for cause, key in bad)
        write_whole(out / BAD_LIST, "".join(lines))
    if shards:
        total = sum(shard.samples for shard in shards)
        manifest = _Manifest(samples=total, bad=causes, shards=shards)
        write_whole(out / MANIFEST, json.dumps(manifest.model_dump(), indent=1) + "\n")
    for path in (out / PLAN, *(_receipt(out, number) for number in range(count))):
        path.unlink()
    if not shards:
        raise DataError(f"{source}: none of {len(bad)} samples can be used ({causes_text(causes)})")
    return PackResult(total, len(shards), causes)


def _read(path: Path, kind: type[T]) -> T:
    """What this module has written."""
    try:
        return read_json_as(path, kind)
    except UserError as error:
        raise DataError(f"{error}; delete it, and what it is about is packed again") from error
