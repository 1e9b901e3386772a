"""Objects written to a real S3 server on loopback, over connections that break."""

from __future__ import annotations

import numpy as np
import pytest

from coca_scale.data import remote, retries
from coca_scale.data.bucket import Bucket
from coca_scale.data.retries import StorageError
from coca_scale.data.storage import StorageOptions
from tests.buckets import BUCKET, content, keys
from tests.data.faulty_server import OF_UPLOADS, loopback_s3
from tests.ports import free_port
from tests.ranks import on_ranks

STUBBORN = StorageOptions(retries=8, timeout_seconds=1.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture(scope="module")
def s3():
    with loopback_s3(about="", faults=OF_UPLOADS) as found:
        yield found


def test_what_is_put_comes_back_whatever_the_network_does(s3, tmp_path, monkeypatch):
    client, proxy = s3
    monkeypatch.setattr(remote, "UPLOAD_PART_BYTES", 5 * 2**20)  # the least that S3 takes
    large, small = np.random.default_rng(0).bytes(11 * 2**20), b"small"
    (tmp_path / "large").write_bytes(large)
    bucket = Bucket(f"s3://{BUCKET}/put", STUBBORN)
    proxy.done.clear()
    for name in ("a/large", "b"):
        bucket.put(tmp_path / "large", name)
    bucket.put(small, "b")
    assert content(client, "put/a/large") == b"".join(bucket.pieces("a/large")) == large
    assert bucket.read("b") == small
    assert bucket.sizes("") == {"a/large": len(large), "b": len(small)}
    assert bucket.sizes("a") == {"large": len(large)}
    assert bucket.sizes("nothing") == {}
    bucket.remove("b")
    bucket.remove("b")
    bucket.check()
    assert keys(client, "put/") == ["put/a/large"]
    assert set(proxy.done) == {fault for fault in OF_UPLOADS if fault}


def test_a_folder_is_a_bucket_as_well(tmp_path):
    for url in (f"{tmp_path}/one", f"file://{tmp_path}/two"):
        bucket = Bucket(url, StorageOptions(0, 5.0))
        bucket.check()
        bucket.put(b"content", "a/b")
        assert bucket.read("a/b") == b"content"
        assert bucket.sizes("") == {"a/b": 7}
        bucket.remove("a/b")
        assert bucket.sizes("") == {}


def test_what_cannot_be_written_to_says_so(s3, tmp_path):
    s3[1].active = False
    with pytest.raises(StorageError, match=r"nowhere/x.* not found"):
        Bucket("s3://nowhere/x", StorageOptions(0, 5.0)).check()
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="failed 1 times"):
        Bucket(str(tmp_path / "file"), StorageOptions(0, 5.0)).check()


def use_bucket(_rank, _ranks, url, large):
    """For `on_ranks`: what becomes of objects in a bucket."""
    bucket = Bucket(url, StorageOptions(1, 30.0))
    bucket.check()
    bucket.put(b"small", "a/small")
    bucket.put(large, "large")
    found = [bucket.sizes(""), bucket.sizes("a"), bucket.sizes("nothing")]
    found += [bucket.read("a/small"), b"".join(bucket.pieces("large"))]
    bucket.remove("large")
    bucket.remove("large")
    return [*found, bucket.sizes("")]


def test_google_storage(tmp_path, monkeypatch):
    from gcp_storage_emulator.server import create_server

    port = free_port()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("FSSPEC_GS", '{"token": "anon"}')
    # read when gcsfs is imported, so in a process of its own: the emulator has no such buckets
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    (tmp_path / "large").write_bytes(large := np.random.default_rng(0).bytes(6 * 2**20))
    try:
        (found,) = on_ranks(use_bucket, 1, "gs://bucket/run", tmp_path / "large")
    finally:
        server.stop()
    sizes = {"a/small": 5, "large": len(large)}
    assert found == [sizes, {"small": 5}, {}, b"small", large, {"a/small": 5}]
