"""Shards from real servers on loopback, over connections that break."""

from __future__ import annotations

import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from coca_scale.data import retries, storage
from coca_scale.data.epoch_shards import expand_shards
from coca_scale.data.retries import StorageError
from coca_scale.data.rules import SampleRules
from coca_scale.data.sample import DataError
from coca_scale.data.shards import read_shard
from coca_scale.data.sources import open_source
from coca_scale.data.storage import StorageOptions, open_shard, read_whole
from tests.conftest import tiny_recipe
from tests.data.faulty_server import FAULTS, FaultyProxy, loopback_s3
from tests.data.loading import steps
from tests.data.shards import write_shards
from tests.disks import no_file_over
from tests.ports import free_port

SHARDS = 24
STUBBORN = StorageOptions(retries=6, timeout_seconds=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("shards")
    write_shards(found, [6] * SHARDS)
    (found / "large.tar").write_bytes(np.random.default_rng(0).bytes(420_001))
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(storage, "CHUNK_BYTES", 2**16)  # several per shard
    monkeypatch.setattr(retries, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture(scope="module")
def s3(folder):
    with loopback_s3() as (client, proxy):
        for path in folder.iterdir():
            client.upload_file(str(path), "bucket", f"data/{path.name}")
        yield "s3://bucket/data", proxy


class Ranges(SimpleHTTPRequestHandler):
    """Python's own file server, with the one thing it lacks: ranges."""

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        asked = self.headers.get("Range")
        if asked is None or not path.is_file():
            return super().do_GET()
        content = path.read_bytes()
        begin, end = (int(x) for x in asked.removeprefix("bytes=").split("-"))
        part = content[begin : end + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {begin}-{begin + len(part) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(part)

    def end_headers(self):
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *args):
        pass


class NoRanges(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(handler, folder):
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server.server_address[1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_s3_gives_the_bytes_of_the_disk_whatever_the_network_does(s3, folder):
    url, proxy = s3
    proxy.done.clear()
    assert read_whole(f"{url}/large.tar", STUBBORN) == (folder / "large.tar").read_bytes()
    assert set(proxy.done) == {fault for fault in FAULTS if fault}


def test_training_from_s3_sees_what_training_from_disk_sees(s3, folder):
    url, proxy = s3
    data = {"data__retries": 12, "data__timeout_seconds": 2.0}
    pattern = f"/{{000..{SHARDS - 1:03d}}}.tar"
    proxy.done.clear()
    expected, _, pixels = steps(f"{folder}{pattern}", 4)
    found, _, same = steps(f"{url}{pattern}", 4, ranks=2, workers=2, **data)
    assert found == expected
    assert (same == pixels).all()
    assert sum(proxy.done.values()) > 10


def test_a_bucket_is_listed_for_a_glob(s3):
    url, proxy = s3
    proxy.active = False
    try:
        found = list(expand_shards(f"{url}/00*.tar", STUBBORN))
        assert found == [f"{url}/{number:03d}.tar" for number in range(10)]
        with pytest.raises(DataError, match="matches nothing"):
            list(expand_shards(f"{url}/none-*.tar", STUBBORN))
        with pytest.raises(DataError, match="nowhere"):
            list(expand_shards("s3://nowhere/*.tar", STUBBORN))
    finally:
        proxy.active = True


def test_http_with_faults_and_after_a_resume_in_the_middle(serve, folder):
    proxy = FaultyProxy(serve(Ranges, folder))
    content = (folder / "large.tar").read_bytes()
    with open_shard(f"http://127.0.0.1:{proxy.port}/large.tar", STUBBORN) as file:
        file.seek(200_000)
        assert file.read(100_000) == content[200_000:300_000]
        file.seek(10)
        assert file.read(10**6) == content[10:]
    assert set(proxy.done) == {fault for fault in FAULTS if fault}
    proxy.close()


def test_servers_without_ranges_need_the_cache(serve, folder, tmp_path):
    url = f"http://127.0.0.1:{serve(NoRanges, folder)}/large.tar"
    with pytest.raises(StorageError, match=r"gives no parts; set data\.cache_dir"):
        read_whole(url, STUBBORN)
    cached = StorageOptions(1, 5.0, tmp_path / "cache")
    assert read_whole(url, cached) == (folder / "large.tar").read_bytes()


def test_the_cache_is_read_again_and_keeps_its_limit(s3, folder, tmp_path):
    url, proxy = s3
    options = StorageOptions(6, 1.0, tmp_path / "cache", cache_bytes=1)
    assert read_whole(f"{url}/000.tar", options) == (folder / "000.tar").read_bytes()
    kept = list((tmp_path / "cache").iterdir())
    assert [path.read_bytes() for path in kept] == [(folder / "000.tar").read_bytes()]
    assert read_whole(f"{url}/001.tar", options) == (folder / "001.tar").read_bytes()
    assert list((tmp_path / "cache").iterdir()) == kept  # full
    proxy.done.clear()
    assert read_whole(f"{url}/000.tar", options) == (folder / "000.tar").read_bytes()
    assert not proxy.done  # nobody asked


@pytest.mark.parametrize("place", ["full", "a file"])
def test_without_room_for_the_cache_shards_are_streamed(place, serve, folder, tmp_path, capfd):
    url = f"http://127.0.0.1:{serve(Ranges, folder)}/large.tar"
    options = StorageOptions(1, 5.0, tmp_path / "cache")
    if place == "a file":
        options.cache_dir.touch()
    storage._say_once.cache_clear()
    with no_file_over(100_000):
        for _ in range(2):
            assert read_whole(url, options) == (folder / "large.tar").read_bytes()
    assert capfd.readouterr().err.count("keeps no more shards: ") == 1
    assert place == "a file" or not list(options.cache_dir.iterdir())


def test_a_copy_that_goes_while_the_cache_is_measured_is_no_fault(serve, folder, tmp_path):
    url = f"http://127.0.0.1:{serve(Ranges, folder)}/large.tar"
    (tmp_path / "gone.tmp").symlink_to("nowhere")
    cached = StorageOptions(1, 5.0, tmp_path, cache_bytes=2**20)
    assert read_whole(url, cached) == (folder / "large.tar").read_bytes()


def test_google_storage(folder, monkeypatch):
    from gcp_storage_emulator.server import create_server
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.storage import Client

    port = free_port()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("FSSPEC_GS", '{"token": "anon"}')
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    try:
        client = Client(credentials=AnonymousCredentials(), project="test")
        blob = client.bucket("bucket").blob("data/large.tar")
        blob.upload_from_filename(str(folder / "large.tar"))
        found = read_whole("gs://bucket/data/large.tar", StorageOptions(1, 10.0))
        assert found == (folder / "large.tar").read_bytes()
    finally:
        server.stop()


def test_commands_that_die_in_the_middle_are_run_again(folder, tmp_path):
    large, mark = folder / "large.tar", tmp_path / "mark"
    once = f"test -e {mark} || {{ touch {mark}; head -c 300000 {large}; exit 3; }}; cat {large}"
    assert read_whole(f"pipe:{once}", STUBBORN) == large.read_bytes()
    mark.unlink()
    stuck = f"if test -e {mark}; then cat {large}; else touch {mark}; sleep 60; fi"
    assert read_whole(f"pipe:{stuck}", STUBBORN) == large.read_bytes()
    with pytest.raises(StorageError, match="failed 2 times, last with exit status 3"):
        read_whole(f"pipe:head -c 9 {large}; exit 3", StorageOptions(1, 5.0))


@pytest.mark.parametrize(
    ("path", "message"),
    [("gone.tar", "no such shard"), ("{7..9}.tar", "no such shard")],
)
def test_a_remote_shard_that_is_not_there(s3, path, message):
    data = tiny_recipe(data__train=f"{s3[0]}/{path}").data
    s3[1].active = False
    try:
        with pytest.raises(DataError, match=message):
            open_source(data.train, data, 0).check()
    finally:
        s3[1].active = True


def test_other_kinds_of_urls_and_what_cannot_be_opened(folder, tmp_path):
    large = folder / "large.tar"
    assert read_whole(f"file://{large}", STUBBORN) == large.read_bytes()
    rules = SampleRules({}, tiny_recipe().data.filters)
    (tmp_path / "folder.tar").mkdir()
    found = list(read_shard(str(tmp_path / "folder.tar"), rules, StorageOptions(retries=0)))
    assert [bad.cause for bad in found] == ["unreadable_shard"]


def test_a_server_that_is_not_there(folder):
    with pytest.raises(StorageError, match="failed 2 times"):
        read_whole(f"http://127.0.0.1:{free_port()}/000.tar", StorageOptions(1, 1.0))
    with pytest.raises(StorageError, match="nope"):
        read_whole("nope://bucket/000.tar", STUBBORN)


STUCK = """
import multiprocessing, subprocess, sys, time
from tests.data.loading import loader
stream = iter(loader("pipe:sleep 90", 0, 1, workers=2, data__timeout_seconds=300))
time.sleep(1)
workers = multiprocessing.active_children()
for worker in workers:
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
time.sleep(1)
assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
print("ready")
"""


@pytest.mark.slow
def test_a_worker_stuck_in_a_read_outlives_the_cluster_s_signal_and_not_its_rank(tmp_path):
    log = tmp_path / "log"  # not a pipe: the command that is read from would hold it open
    with log.open("w") as file:
        command = [sys.executable, "-c", STUCK]
        done = subprocess.run(command, stdout=file, stderr=file, check=False, timeout=60)
    assert done.returncode == 0, log.read_text()
    assert "ready" in log.read_text()
