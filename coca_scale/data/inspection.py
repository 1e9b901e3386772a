"""What is in shards: counts, sizes, caption lengths, faults."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from coca_scale.data.epoch_shards import ShardList, expand_shards
from coca_scale.data.images import decode_image
from coca_scale.data.manifest import MANIFEST
from coca_scale.data.pack import Progress
from coca_scale.data.rules import SampleRules
from coca_scale.data.sample import BadSample, DataError, RawSample, Skipped, remedy_of
from coca_scale.data.shards import read_shard
from coca_scale.data.storage import StorageOptions, is_local
from coca_scale.data.workers import working
from coca_scale.openclip.alone import open_clip_module
from coca_scale.recipe.data import DataFilters
from coca_scale.recipe.files import sha256_of
from coca_scale.recipe.whole_files import whole_file, write_whole

SIDES = (64, 128, 224, 256, 336, 448, 512, 1024, 2048)
BIN_TOKENS = 8
MAX_BINS = 40
BAR_WIDTH = 40
WORST_SHARDS = 5
CONTEXT = 77  # tokens that CLIP reads


@dataclass
class ShardReport:
    """What one shard holds.

    Attributes:
        url: of the shard.
        samples: usable and unusable ones, each key once.
        usable: samples that can be used.
        image_bytes: of usable samples, encoded.
        lengths: captions of usable samples by tokens of CLIP's BPE, with start and end.
        sides: samples by shortest side, in pixels.
        formats: samples by image format.
        skipped: unusable samples.
    """

    url: str
    samples: int = 0
    usable: int = 0
    image_bytes: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    sides: Counter[int] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    skipped: list[Skipped] = field(default_factory=list)


@dataclass(frozen=True)
class Inspection:
    """What a set of shards holds."""

    shards: list[ShardReport]

    @property
    def samples(self) -> int:
        """Samples, unusable ones included."""
        return sum(shard.samples for shard in self.shards)

    @property
    def usable(self) -> int:
        """Samples that can be used."""
        return sum(shard.usable for shard in self.shards)

    @property
    def causes(self) -> Counter[str]:
        """Unusable samples by cause."""
        return Counter(bad.cause for shard in self.shards for bad in shard.skipped)

    @property
    def lengths(self) -> Counter[int]:
        """Captions of usable samples by length in tokens."""
        return sum((shard.lengths for shard in self.shards), Counter())

    def facts(self) -> dict[str, Any]:
        """Everything as plain data for JSON."""
        sides = sum((shard.sides for shard in self.shards), Counter())
        return {
            "shards": len(self.shards),
            "samples": self.samples,
            "usable": self.usable,
            "captions": self.lengths.total(),
            "captions_cut": sum(n for tokens, n in self.lengths.items() if tokens > CONTEXT),
            "image_bytes": sum(shard.image_bytes for shard in self.shards),
            "samples_per_shard": _range_text([shard.samples for shard in self.shards]),
            "shortest_side_pixels": _range_text(list(sides.elements())),
            "caption_tokens": _range_text(list(self.lengths.elements())),
            "formats": dict(sum((shard.formats for shard in self.shards), Counter())),
            "bad": dict(self.causes.most_common()),
            "bad_shards": {
                shard.url: dict(Counter(bad.cause for bad in shard.skipped))
                for shard in self.shards
                if shard.skipped
            },
        }

    def text(self) -> str:
        """For a terminal: a table, a histogram of caption lengths, faults by cause and shard."""
        facts = self.facts()
        usable = max(1, facts["usable"])
        mean = facts["image_bytes"] / usable
        lines = [
            f"shards           {facts['shards']:,}, samples each {facts['samples_per_shard']}",
            f"samples          {facts['samples']:,}, usable {facts['usable']:,}",
            f"pictures         {facts['image_bytes'] / 1e9:,.3f} GB, mean {mean / 1e3:,.1f} kB, "
            + ", ".join(f"{count:,} {name}" for name, count in facts["formats"].items()),
            f"shortest side    {facts['shortest_side_pixels']} pixels",
            f"captions         {facts['captions']:,}, {facts['captions'] / usable:.2g} a picture",
            f"caption length   {facts['caption_tokens']} tokens of CLIP's BPE",
            *_bars(self.lengths),
        ]
        if facts["captions_cut"]:
            lines.append(
                f"captions longer than CLIP's context of {CONTEXT} tokens: "
                f"{facts['captions_cut']:,}; they are cut, and model.context_length sets where"
            )
        if self.causes:
            lines.append("unusable")
            for cause, count in self.causes.most_common():
                remedy = remedy_of(cause)
                lines.append(f"  {count:>9,}  {cause}{f' ({remedy})' if remedy else ''}")
            worst = sorted(self.shards, key=lambda shard: -len(shard.skipped))[:WORST_SHARDS]
            lines += [f"  {len(w.skipped):>9,}  in {w.url}" for w in worst if w.skipped]
        return "\n".join(lines)

    def draw(self, path: Path) -> None:
        """The histogram of caption lengths as a picture."""
        import matplotlib  # slow to import

        matplotlib.use("Agg")
        from matplotlib import pyplot

        bins = _binned(self.lengths)
        figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
        axes.bar(list(bins), list(bins.values()), width=BIN_TOKENS * 0.9, align="edge")
        axes.axvline(CONTEXT, color="0.4", linestyle="--", linewidth=1)
        style = {"transform": axes.get_xaxis_transform(), "ha": "right", "va": "top"}
        axes.text(CONTEXT - 1, 1, f"{CONTEXT}: CLIP's context", color="0.4", **style)
        axes.set(xlabel="tokens per caption", ylabel="captions", xlim=(0, None))
        axes.set_title(f"{self.lengths.total():,} captions in {len(self.shards):,} shards")
        axes.spines[["top", "right"]].set_visible(False)
        with whole_file(path) as file:
            figure.savefig(file, dpi=150, format=path.suffix.removeprefix(".") or "png")
        pyplot.close(figure)


def inspect_shards(
    patterns: Sequence[str],
    decode: bool = True,
    workers: int = 1,
    progress: Progress | None = None,
    captions: Sequence[str] = (),
) -> Inspection:
    """Read shards from end to end.

    Args:
        patterns: as in data.train.
        decode: decode every picture, which is what finds broken ones.
        workers: processes.
        progress: called with the number of shards done and their total.
        captions: names of what holds captions, as in data.captions; none: as training reads them.

    Raises:
        DataError: a pattern that names nothing.
    """
    urls = ShardList(
        url for pattern in patterns for url in expand_shards(pattern, StorageOptions())
    )
    reports: list[ShardReport | None] = [None] * len(urls)
    with working(min(workers, max(1, len(urls)))) as pool:
        jobs = {
            pool.submit(_inspect, url, decode, tuple(captions)): number
            for number, url in enumerate(urls)
        }
        for done, job in enumerate(as_completed(jobs), start=1):
            reports[jobs[job]] = job.result()
            if progress is not None:
                progress(done, len(urls))
    return Inspection([report for report in reports if report is not None])


def write_manifest(found: Inspection) -> Path:
    """Write manifest.json beside local shards of one folder, so that runs know their sizes.

    Raises:
        DataError: several folders, or shards that are not files.
    """
    folders = {Path(shard.url).parent for shard in found.shards}
    if len(folders) != 1 or not all(is_local(shard.url) for shard in found.shards):
        raise DataError("a manifest is for the local shards of one folder")
    path = folders.pop() / MANIFEST
    shards = []
    for shard in found.shards:
        file = Path(shard.url)
        about = {"name": file.name, "samples": shard.samples, "bytes": file.stat().st_size}
        shards.append({**about, "sha256": sha256_of(file)})
    content = {"samples": found.samples, "bad": dict(found.causes), "shards": shards}
    write_whole(path, json.dumps(content, indent=1) + "\n")
    return path


def _inspect(url: str, decode: bool, captions: tuple[str, ...]) -> ShardReport:
    report = ShardReport(url)
    keys: set[str] = set()
    rules = SampleRules(dict.fromkeys(captions, 1.0), DataFilters(), every_caption=True)
    for sample in read_shard(url, rules, StorageOptions()):
        try:
            if isinstance(sample, BadSample):
                raise sample
            if sample.key in keys:  # not only right behind each other
                raise BadSample("duplicate_key", sample.key)
            keys.add(sample.key)
            _describe(sample, decode, report)
        except BadSample as bad:
            report.skipped.append(bad.skipped._replace(shard=url))
        aside = isinstance(sample, BadSample) and (
            sample.cause == "duplicate_key" or sample.skipped.key == url
        )
        report.samples += not aside
    return report


def _describe(sample: RawSample, decode: bool, report: ShardReport) -> None:
    assert isinstance(sample.image, bytes)
    if decode:
        image = decode_image(sample.image, sample.key)
        report.sides[min(image.size)] += 1
    report.formats[_format(sample.image)] += 1
    report.image_bytes += len(sample.image)
    report.usable += 1
    for caption, _ in sample.captions:
        report.lengths[len(_bpe().encode(caption)) + 2] += 1


@lru_cache(maxsize=1)
def _bpe() -> Any:
    return open_clip_module("tokenizer").SimpleTokenizer()


def _format(data: bytes) -> str:
    """By the first bytes, whatever the name says."""
    known = {b"\xff\xd8": "JPEG", b"\x89P": "PNG", b"RI": "WEBP", b"GI": "GIF"}
    return known.get(data[:2], "other")


def _range_text(values: list[int]) -> str:
    """Smallest, median and largest."""
    if not values:
        return "unknown"
    ordered = sorted(values)
    if ordered[0] == ordered[-1]:
        return f"{ordered[0]:,}"
    return f"{ordered[0]:,} to {ordered[-1]:,}, median {ordered[len(ordered) // 2]:,}"


def _binned(lengths: Counter[int]) -> dict[int, int]:
    """Counts by first length of a bin; all above the last bin are in it."""
    if not lengths:
        return {}
    bins = min(MAX_BINS, max(lengths) // BIN_TOKENS + 1)
    counts = dict.fromkeys((number * BIN_TOKENS for number in range(bins)), 0)
    for length, count in lengths.items():
        counts[min(length // BIN_TOKENS, bins - 1) * BIN_TOKENS] += count
    return counts


def _bars(lengths: Counter[int]) -> list[str]:
    bins = _binned(lengths)
    largest = max(bins.values(), default=0)
    lines = []
    for first, count in bins.items():
        bar = "█" * math.ceil(BAR_WIDTH * count / largest) if count else ""
        lines.append(f"  {first:>4}-{first + BIN_TOKENS - 1:<4} {count:>9,} {bar}")
    return lines
