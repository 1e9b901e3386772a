"""Write WebDataset shards from a folder, a table or a COCO annotation file."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from webdataset import TarWriter

from coca_scale.data.images import decode_image
from coca_scale.data.sample import BadSample, DataError
from coca_scale.data.shards import IMAGE_EXTENSIONS, MANIFEST
from coca_scale.data.sources import TABLE_SUFFIXES
from coca_scale.data.tables import read_table
from coca_scale.recipe.files import sha256_of

JPEG_QUALITY = 95
EXTENSION_OF = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class PackOptions:
    """How to read the source and write the shards."""

    images: Path | None = None
    image_column: str = "filepath"
    caption_column: str = "title"
    shard_samples: int = 10000
    max_side: int | None = None


@dataclass(frozen=True)
class PackResult:
    """What was written: samples, shards, and skipped samples by cause."""

    samples: int
    shards: int
    bad: Counter[str]


def pack(source: Path, out: Path, options: PackOptions) -> PackResult:
    """Write shards and `manifest.json` into `out`.

    A shard has its final name only when it is complete, and the manifest comes last.

    Raises:
        DataError: the source cannot be read, or nothing in it can be used.
    """
    if (out / MANIFEST).exists():
        raise DataError(f"{out}: holds packed shards already; choose another folder")
    pairs = list(list_pairs(source, options))
    out.mkdir(parents=True, exist_ok=True)
    bad: Counter[str] = Counter()
    shards: list[dict[str, Any]] = []
    samples = _encoded(pairs, options, bad)
    while written := _write_shard(out, len(shards), samples, options.shard_samples):
        shards.append(written)
    if not shards:
        raise DataError(f"{source}: none of {len(pairs)} samples can be used ({_causes(bad)})")
    total = sum(shard["samples"] for shard in shards)
    manifest = {"samples": total, "bad": dict(bad), "shards": shards}
    temporary = out / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    temporary.replace(out / MANIFEST)
    return PackResult(total, len(shards), bad)


def list_pairs(source: Path, options: PackOptions) -> Iterator[tuple[Path, str]]:
    """(image file, caption) pairs of a folder with .txt side-cars, a table, or COCO json.

    Raises:
        DataError: not one of these, or without content.
    """
    if source.is_dir():
        yield from _folder_pairs(source)
    elif source.suffix in TABLE_SUFFIXES:
        rows = read_table(source, options.image_column, options.caption_column)
        yield from ((Path(path), caption) for path, caption in rows)
    elif source.suffix == ".json" and source.is_file():
        yield from _coco_pairs(source, options.images)
    else:
        raise DataError(f"{source}: give a folder, a .csv or .tsv file, or a COCO .json file")


def _folder_pairs(folder: Path) -> Iterator[tuple[Path, str]]:
    suffixes = {f".{extension}" for extension in IMAGE_EXTENSIONS}
    images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes)
    if not images:
        raise DataError(f"{folder}: no images ({', '.join(sorted(suffixes))}) in it")
    for image in images:
        caption_file = image.with_suffix(".txt")
        text = caption_file.read_text(errors="replace") if caption_file.is_file() else ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        yield image, lines[0] if lines else ""


def _coco_pairs(path: Path, images: Path | None) -> Iterator[tuple[Path, str]]:
    if images is None:
        raise DataError(f"{path}: say where the pictures are with --images DIR")
    try:
        content = json.loads(path.read_text())
        names = {image["id"]: image["file_name"] for image in content["images"]}
        pairs = [(names[a["image_id"]], a["caption"]) for a in content["annotations"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a COCO caption annotation file ({error!r})") from error
    yield from ((images / name, caption) for name, caption in pairs)


def _encoded(
    pairs: list[tuple[Path, str]], options: PackOptions, bad: Counter[str]
) -> Iterator[dict[str, object]]:
    for number, (path, caption) in enumerate(pairs):
        try:
            if not caption.strip():
                raise BadSample("empty_caption", str(path))
            extension, data = _image_bytes(path, options.max_side)
        except BadSample as error:
            bad[error.cause] += 1
            continue
        text = caption.strip().encode("utf-8")
        yield {"__key__": f"{number:09d}", extension: data, "txt": text}


def _image_bytes(path: Path, max_side: int | None) -> tuple[str, bytes]:
    """The file as it is, or scaled down to `max_side` and written as JPEG."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadSample("missing_image", str(path)) from error
    image = decode_image(data, str(path))
    with Image.open(io.BytesIO(data)) as original:
        extension = EXTENSION_OF.get(original.format or "")
    if extension is not None and (max_side is None or max(image.size) <= max_side):
        return extension, data
    if max_side is not None:
        image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return "jpg", buffer.getvalue()


def _write_shard(
    out: Path, number: int, samples: Iterator[dict[str, object]], most: int
) -> dict[str, Any] | None:
    """Write up to `most` samples; None if there are no more."""
    first = next(samples, None)
    if first is None:
        return None
    path = out / f"shard-{number:06d}.tar"
    temporary = path.with_suffix(".tar.tmp")
    count = 0
    with temporary.open("wb") as file, TarWriter(file, mtime=0) as writer:
        sample: dict[str, object] | None = first
        while sample is not None:
            writer.write(sample)
            count += 1
            sample = next(samples, None) if count < most else None
    digest = sha256_of(temporary)
    size = temporary.stat().st_size
    temporary.replace(path)
    return {"name": path.name, "samples": count, "bytes": size, "sha256": digest}


def _causes(bad: Counter[str]) -> str:
    return ", ".join(f"{n} × {cause}" for cause, n in bad.most_common()) or "none found"
