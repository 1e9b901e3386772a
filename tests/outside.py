"""Readers of files that others wrote, each with small real ones to begin with."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from coca_scale.data.images import FORMATS, TrainCrop, decode_image, eval_pixels, train_pixels
from coca_scale.data.listing import ListOptions, list_pictures
from coca_scale.data.manifest import MANIFEST, shard_counts
from coca_scale.data.rows import TableOptions, read_rows
from coca_scale.data.rules import SampleRules
from coca_scale.data.sample import BadSample, Position, RawSample
from coca_scale.data.shards import read_shard
from coca_scale.data.sources import open_source
from coca_scale.data.storage import StorageOptions
from coca_scale.data.stored_features import FeatureFile
from coca_scale.data.tokens import TOKENIZER_FILE, clip_bpe_prefix, make_tokenizer
from coca_scale.engine.checkpoint import verify_checkpoint
from coca_scale.evaluation.zeroshot import make_classes
from coca_scale.model import load_model_config
from coca_scale.model.config import CONFIG_FOLDER
from coca_scale.model.hf_config import SHIPPED, architecture
from coca_scale.openclip.weight_files import read_weight_file
from coca_scale.recipe.load import load_recipe
from tests.conftest import tiny_recipe
from tests.data.pngs import PNG_MAGIC, black_png, chunk
from tests.fuzz import Reader

RECIPES = Path(__file__).parents[1] / "recipes"
RULES = SampleRules({}, tiny_recipe().data.filters)
NO_RETRIES = StorageOptions(0)


def _encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pictures() -> list[bytes]:
    """Every format that is opened, in the modes it has, with metadata."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    found = [black_png(24, 20, chunk(b"eXIf", exif.tobytes()[6:])), black_png(9, 9, channels=4)]
    deep = [Image.fromarray(noise[..., 0].astype(kind)) for kind in (np.uint16, np.int32)]
    deep.append(Image.fromarray(noise[..., 0].astype(np.float32)))
    modes = [image.convert(mode) for mode in ("1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "LAB")]
    for form in FORMATS:
        for picture in (image, *modes, *deep):
            try:
                found.append(_encoded(picture, form, exif=exif))
            except (OSError, ValueError, KeyError):
                continue  # the format has no such mode
    animation = {"save_all": True, "append_images": [image.rotate(90)]}
    found += [_encoded(image, form, **animation) for form in ("GIF", "WEBP", "PNG", "MPO")]
    found.append(_encoded(image, "JPEG", progressive=True))
    for packing in ("tiff_deflate", "tiff_lzw", "packbits", "jpeg"):
        found.append(_encoded(image, "TIFF", compression=packing))
    found.append(_encoded(modes[0], "TIFF", compression="group4"))
    return found


def mend_png(data: bytearray) -> None:
    """Checksums of all chunks."""
    if not data.startswith(PNG_MAGIC):
        return
    begin = len(PNG_MAGIC)
    while begin + 12 <= len(data):
        end = begin + 8 + int.from_bytes(data[begin : begin + 4], "big")
        if end + 4 > len(data):
            return
        data[end : end + 4] = zlib.crc32(data[begin + 4 : end]).to_bytes(4, "big")
        begin = end + 4


def _read_picture(path: Path) -> None:
    data = path.read_bytes()
    for crop in (TrainCrop(32, 0.5), TrainCrop(32, 1.0)):
        try:
            train_pixels(data, "k", crop, np.random.default_rng(0))
        except BadSample:
            continue
    eval_pixels(decode_image(data, "k"), 32)


def tars() -> list[bytes]:
    """What tools write: pax and GNU headers, long names, links, folders, sparse files."""
    picture = _encoded(Image.new("RGB", (4, 4)), "JPEG")
    found = []
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            for name in ("a.jpg", "a.txt", "b/ü.jpg", "b/ü.txt", "b/ü.json"):
                about = tarfile.TarInfo(name)
                content = picture if name.endswith("jpg") else b'{"caption": "words"}'
                about.size = len(content)
                if form == tarfile.PAX_FORMAT:
                    about.pax_headers = {"size": str(len(content)), "comment": "x"}
                tar.addfile(about, io.BytesIO(content))
            if form != tarfile.USTAR_FORMAT:
                long = tarfile.TarInfo(f"{'long/' * 40}c.jpg")
                long.type, long.linkname = tarfile.SYMTYPE, "to/" * 60
                tar.addfile(long)
            for kind in (tarfile.DIRTYPE, tarfile.LNKTYPE):
                other = tarfile.TarInfo(f"d{kind[0]}")
                other.type = kind
                tar.addfile(other)
        found.append(buffer.getvalue()[:-8192])
    return [*found, found[0] + found[1]]


def mend_tar(data: bytearray) -> None:
    """Checksums of all headers."""
    for begin in range(0, len(data) - 511, 512):
        if data[begin + 257 : begin + 262] == b"ustar":
            data[begin + 148 : begin + 156] = b" " * 8
            data[begin + 148 : begin + 156] = b"%06o\0 " % sum(data[begin : begin + 512])


def _read_tar(path: Path) -> None:
    for entry in read_shard(str(path), RULES, NO_RETRIES):
        assert isinstance(entry, RawSample | BadSample)
    source = open_source(str(path), tiny_recipe().data, 0)
    for position, _ in source.lane(0, 1, Position()):
        assert position.byte < 2**63


def tables() -> list[bytes]:
    """CSV and TSV with quotes and more columns than needed."""
    return [
        b'filepath,title\na.jpg,"one, two"\nb.jpg,three\n',
        b'filepath\ttitle\tsource\na.jpg\tone\tx\nb.jpg\t"two\ty\n',
        "filepath,title\r\nü.jpg,日本\r\n".encode("utf-8-sig"),
    ]


def _read_table(path: Path) -> None:
    for _ in read_rows(path, TableOptions("filepath", "title")):
        pass


def manifests() -> list[bytes]:
    """Of coca-scale."""
    shards = [{"name": f"{n:03d}.tar", "samples": n, "bytes": 9, "sha256": "0"} for n in range(3)]
    return [json.dumps({"samples": 3, "bad": {}, "shards": shards}).encode()]


def _read_manifest(path: Path) -> None:
    shard_counts([str(path.parent / f"{n:03d}.tar") for n in range(3)], NO_RETRIES)


def annotations() -> list[bytes]:
    """COCO's and Karpathy's."""
    images = [{"id": n, "file_name": f"{n}.jpg", "height": 4, "width": 4} for n in range(3)]
    notes = [{"id": n, "image_id": n % 3, "caption": f"caption {n}"} for n in range(6)]
    sentences = [{"raw": "a dog", "tokens": ["a", "dog"]}, {"raw": "one"}]
    about = {"filepath": "val2014", "split": "train", "sentences": sentences}
    karpathy = [{"filename": f"{n}.jpg", **about} for n in range(3)]
    contents = [{"info": {}, "images": images, "annotations": notes}, {"images": karpathy}]
    return [json.dumps(content).encode() for content in contents]


def _read_annotations(path: Path) -> None:
    list_pictures(path, ListOptions(images=path.parent))


def side_cars() -> list[bytes]:
    """Captions as people write them."""
    return [b"a dog\nein Hund\n", "\ufeffkurz".encode(), "日本".encode("utf-16")]


def _read_side_car(path: Path) -> None:
    path.with_suffix(".jpg").touch()
    list_pictures(path.parent, ListOptions())


def recipes() -> list[bytes]:
    """The shipped ones."""
    return [path.read_bytes() for path in sorted(RECIPES.glob("*.yaml"))]


def model_configs() -> list[bytes]:
    """Of each kind of tower and decoder."""
    names = ("coca_tiny", "clip_tiny", "coca_roberta-ViT-B-32", "coca_ViT-L-14")
    return [(CONFIG_FOLDER / f"{name}.json").read_bytes() for name in names]


def hugging_face_configs() -> list[bytes]:
    """The shipped ones."""
    return [path.read_bytes() for path in sorted(SHIPPED.rglob("*.json"))]


def _weights() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.ones(4, 4), "b": torch.zeros(16, dtype=torch.bfloat16)}


def safetensors() -> list[bytes]:
    """A small file of weights."""
    return [save(_weights())]


def torch_files() -> list[bytes]:
    """Weights, and a training checkpoint around them, in both formats of torch."""
    found = []
    for content in (_weights(), {"epoch": 3, "state_dict": _weights(), "optimizer": {"lr": 1e-3}}):
        for as_zip in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=as_zip)
            found.append(buffer.getvalue())
    return found


def tokenizers() -> list[bytes]:
    """The start of CLIP's."""
    return [clip_bpe_prefix(600).to_str().encode()]


def _read_tokenizer(path: Path) -> None:
    tokenizer = make_tokenizer(load_model_config("coca_tiny"), path.parent)
    tokenizer(["a red circle", "ü"])


def checkpoint_manifests() -> list[bytes]:
    """Of a checkpoint with a file that is not there."""
    entry = {"bytes": 3, "sha256": "0" * 64}
    return [json.dumps({"files": {"progress.json": entry, "state/x.pt": entry}}).encode()]


def _read_checkpoint(path: Path) -> None:
    verify_checkpoint(path.parent)


def class_names() -> list[bytes]:
    """A name per line."""
    return [b"dog\ncat\n", "Hündchen\r\n\r\n猫".encode("utf-8-sig")]


def _read_class_names(path: Path) -> None:
    make_classes(str(path), "simple", None)


def stored_features() -> list[bytes]:
    """Of a shard with three captions of two pictures."""
    tensors = {
        "captions": torch.tensor([-5, 3, 9]),
        "picture": torch.tensor([0, 1, 0], dtype=torch.int32),
        "images": torch.randn(2, 4).half(),
        "texts": torch.randn(3, 4).half(),
    }
    return [save(tensors)]


def _read_features(path: Path) -> None:
    file = FeatureFile(path, 4)
    for caption in (-5, 3, 9, 4):
        file.pair(caption)


READERS = {
    "pictures": Reader(pictures, _read_picture, "x.jpg", mend_png),
    "tar": Reader(tars, _read_tar, "x.tar", mend_tar),
    "tables": Reader(tables, _read_table, "x.csv"),
    "annotations": Reader(annotations, _read_annotations, "x.json", is_json=True),
    "side_cars": Reader(side_cars, _read_side_car, "x.txt"),
    "manifests": Reader(manifests, _read_manifest, MANIFEST, is_json=True),
    "recipes": Reader(recipes, load_recipe, "x.yaml"),
    "model_configs": Reader(
        model_configs, lambda path: load_model_config(str(path)), "x.json", is_json=True
    ),
    "hugging_face_configs": Reader(
        hugging_face_configs,
        lambda path: architecture(str(path.parent), None, "x"),
        "config.json",
        is_json=True,
    ),
    "safetensors": Reader(safetensors, read_weight_file, "x.safetensors"),
    "stored_features": Reader(stored_features, _read_features, "x.safetensors"),
    "torch_files": Reader(torch_files, read_weight_file, "x.pt"),
    "tokenizers": Reader(tokenizers, _read_tokenizer, TOKENIZER_FILE, is_json=True),
    "checkpoint_manifests": Reader(
        checkpoint_manifests, _read_checkpoint, "manifest.json", is_json=True
    ),
    "class_names": Reader(class_names, _read_class_names, "x.txt"),
}
