"""Rotten data is skipped, counted exactly, named, and can do no harm."""

from __future__ import annotations

import io
import resource
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from coca_scale.data.images import TrainCrop
from coca_scale.data.loader import decode_sample
from coca_scale.data.rules import SampleRules
from coca_scale.data.sample import BadSample, Position
from coca_scale.data.shards import read_shard
from coca_scale.data.sources import open_source
from coca_scale.data.storage import StorageOptions
from coca_scale.data.tokens import ClipTokenizer, make_tokenizer
from coca_scale.model import load_model_config
from tests.conftest import tiny_recipe
from tests.data.rot import BOMB, rot_shards, write_rotten_shards
from tests.data.shards import encoded
from tests.distributed.launching import start
from tests.json_lines import lines_of

LANES = 8
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def rotten(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rotten")
    planted = write_rotten_shards(folder)
    lost = rot_shards(folder, planted)
    return folder, planted, lost


def test_an_epoch_finds_exactly_what_was_planted(rotten):
    folder, planted, lost = rotten
    data = tiny_recipe(data__train=str(folder)).data
    source = open_source(data.train, data, 0)
    assert source.count() == 2400
    tokenizer = make_tokenizer(load_model_config("coca_tiny"))
    found, shard_losses, good = defaultdict(Counter), Counter(), Counter()
    for lane in range(LANES):
        for _, sample in source.lane(lane, LANES, Position()):
            try:
                if isinstance(sample, BadSample):
                    raise sample
                decode_sample(sample, tokenizer, TrainCrop(32, 0.9), RNG)
                good[sample.shard, sample.key] += 1
            except BadSample as bad:
                skipped = bad.skipped
                if skipped.cause in lost:
                    shard_losses[skipped.cause] += skipped.lost
                else:
                    shard = Path(skipped.shard or sample.shard).name
                    found[skipped.cause][shard, skipped.key] += 1
    assert shard_losses == lost
    assert found == {cause: Counter(dict.fromkeys(where, 1)) for cause, where in planted.items()}
    assert set(good.values()) == {1}
    # of a duplicated sample the first is good
    bad = sum(len(where) for cause, where in planted.items() if cause != "duplicate_key")
    assert sum(good.values()) + bad + sum(lost.values()) == 2400


@pytest.mark.slow
def test_a_run_over_rot_ends_and_lists_it(rotten, tmp_path):
    folder, planted, _ = rotten
    overrides = [
        *(f"data.train={folder}", "data.val=null", "data.lanes=16", "data.workers=1"),
        *("data.max_bad_fraction=0.8", "train.steps=20", "log.every_steps=5"),
        *("train.global_batch=64", "train.micro_batch=32"),
        "checkpoint.every_steps=null",
    ]
    job = start(tmp_path / "run", *overrides)
    assert job.wait() == 0, job.output[-3000:]
    listed = lines_of(tmp_path / "run" / "bad_samples.jsonl")
    found = defaultdict(set)
    for line in listed:
        found[line["cause"]].add((Path(line["shard"]).name, line["key"]))
    assert {c for _, c in found.pop("empty_shard")} == {
        str(folder / f"{number:03d}.tar") for number in (11, 31)
    }
    assert {c for c, _ in found.pop("truncated_shard")} == {"003.tar", "023.tar"}
    assert found == planted  # 80 good samples are more than an epoch of every lane
    last = lines_of(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["bad_samples"] == sum(line["samples"] for line in listed)
    counts = Counter()
    for line in listed:
        counts[line["cause"]] += line["samples"]
    assert (
        "skipped samples: " + ", ".join(f"{n} × {c}" for c, n in counts.most_common(1))
        in job.output
    )


@pytest.mark.slow
def test_too_much_rot_stops_the_run_and_says_where(rotten, tmp_path):
    folder = rotten[0]
    job = start(tmp_path / "run", f"data.train={folder}", "data.val=null")
    assert job.wait() == 1
    output = job.output
    assert "more than data.max_bad_fraction=0.1 allows" in output
    assert "Traceback" not in output
    assert (tmp_path / "run" / "bad_samples.jsonl").is_file()


def shard_of(folder, build):
    path = folder / "x.tar"
    with tarfile.open(path, "w") as tar:
        build(tar)
    rules = SampleRules({}, tiny_recipe().data.filters)
    return [
        s.cause if isinstance(s, BadSample) else s.key
        for s in read_shard(str(path), rules, StorageOptions())
    ]


def add(tar, name, content=b"", **changes):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in changes.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def test_no_size_in_a_tar_is_believed(tmp_path):
    def sparse(tar):
        add(tar, "a.jpg", encoded(), pax_headers={"GNU.sparse.realsize": str(2**50)})

    assert shard_of(tmp_path, sparse) == ["broken_shard"]

    path = tmp_path / "x.tar"
    huge = tarfile.TarInfo("a.jpg")
    huge.size = 2**40
    tail = io.BytesIO()
    with tarfile.open(fileobj=tail, mode="w") as tar:
        add(tar, "b.jpg", encoded())
    path.write_bytes(huge.tobuf() + tail.getvalue())
    rules = SampleRules({}, tiny_recipe().data.filters)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = list(read_shard(str(path), rules, StorageOptions()))
    assert [bad.cause for bad in found] == ["truncated_shard"]
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        header = tarfile.TarInfo("x")
        header.type, header.size = kind, 2**40
        path.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + tail.getvalue())
        found = list(read_shard(str(path), rules, StorageOptions()))
        assert [bad.cause for bad in found] == ["broken_shard"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
    assert len(BOMB) < 200_000


def test_long_names_and_odd_members_are_read_as_tar_writes_them(tmp_path):
    long = "folder/" * 30 + "picture"

    def build(tar):
        add(tar, "folder", type=tarfile.DIRTYPE)
        add(tar, f"{long}.jpg", encoded())
        add(tar, f"{long}.txt", b"words")
        add(tar, "README", b"no extension")
        add(tar, "._hidden.jpg", b"what macOS adds")
        add(tar, "b.JPG", encoded())
        add(tar, "b.txt", b"words")
        add(tar, "b.cls", b"7")

    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):

        def formed(tar, form=form):
            tar.format = form
            build(tar)

        assert shard_of(tmp_path, formed) == [long, "b"]


def test_text_without_end_is_refused_or_cut(tmp_path):
    def build(tar):
        add(tar, "a.jpg", encoded())
        add(tar, "a.txt", b"x" * (2**20 + 1))
        add(tar, "b.jpg", encoded())
        add(tar, "b.txt", b"x" * 2**20)
        add(tar, "b.bin", bytes(2**22))  # nobody asks for it

    assert shard_of(tmp_path, build) == ["oversized_file", "b"]
    rules = SampleRules({}, tiny_recipe().data.filters)
    sample = list(read_shard(str(tmp_path / "x.tar"), rules, StorageOptions()))[1]
    assert sample.caption == "x" * 4096  # a word of a million letters takes the BPE hours
    tokens = decode_sample(sample, ClipTokenizer(77), TrainCrop(8, 0.9), RNG).tokens
    assert tokens[-1] == 49407
