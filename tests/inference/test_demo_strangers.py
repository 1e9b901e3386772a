"""The demo page among strangers: other sites, names that point here, uploads that never end."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from PIL import Image

from tests.variants import untrained_export

SERVER = """
import sys
from coca_scale.inference.demo import Describer, Limits, listen, make_app, serve
from coca_scale.inference.generation_options import GenerationOptions
from coca_scale.inference.load import load_model
folder, bound, host = sys.argv[1:]
listening = listen(bound, 0)
describer = Describer(load_model(folder), GenerationOptions(seq_len=8, num_beams=6, samples=3))
site = make_app(describer, "a model", Limits(500_000, 3.0, 2), host)
print(listening.getsockname()[1], flush=True)
serve(site, listening)
"""
HEAD = "POST /api/describe HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n"


class Running:
    """A server, and what it says on stderr."""

    def __init__(self, folder, host):
        self.log = (folder / "log").open("w+")
        command = [sys.executable, "-c", SERVER, str(folder), "127.0.0.1", host]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.port = int(self.process.stdout.readline())

    def ask(self, path="/api/describe", data=None, **headers):
        """Status and text of an answer."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        address = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(address, data=data, headers=named)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def begin(self, text):
        """A connection on which this was sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=120)
        connection.sendall(text)
        return connection

    def end(self):
        self.process.kill()
        self.process.wait()
        self.log.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return untrained_export(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model):
    running = Running(model, "127.0.0.1")
    yield running
    running.end()


@pytest.fixture(scope="module")
def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:9000", "Origin": "http://localhost:9000"}, 200),  # through a tunnel
        ({"Host": "127.0.0.1", "Origin": "http://127.0.0.1", "Sec_Fetch_Site": "same-origin"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:2"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost.evil.example"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 400),
        ({"Host": "localhost@evil.example"}, 400),
        ({"Host": "localhost:1@evil.example"}, 400),
        ({"Host": "evil.example:80/localhost"}, 400),
        ({"Host": "192.168.1.5"}, 400),
        ({"Host": "[::1"}, 400),
    ],
)  # fmt: skip
def test_only_its_own_page_may_ask(server, picture, headers, status):
    found = server.ask(data=picture, **headers)
    assert found[0] == status, found
    if status == 400:
        assert server.ask("/", **headers)[0] == 400


def test_on_an_open_address_it_goes_by_addresses_and_its_own_name(model, picture):
    running = Running(model, "0.0.0.0")
    try:
        name = socket.gethostname()
        for host in ("192.168.1.5:7860", "[fe80::1]:7860", name, f"{name}.lab:1", "localhost"):
            assert running.ask(data=picture, Host=host, Origin=f"http://{host}")[0] == 200
        for host in ("evil.example", f"x{name}", "192.168.1.5.evil.example", f"{name}@evil"):
            assert running.ask(data=picture, Host=host, Origin=f"http://{host}")[0] == 400
        assert running.ask(data=picture, Origin="http://evil.example")[0] == 403
    finally:
        running.end()


def test_uploads_are_few_and_end(server, picture):
    silent = [server.begin(b"GET / HT"), server.begin(b"")]
    held = [server.begin(HEAD.format(400_000).encode() + b"x" * 1000) for _ in range(2)]
    status, text = server.ask(data=picture)
    assert (status, json.loads(text)) == (503, {"error": "too many pictures at a time; try again"})
    for connection in held:  # both end by themselves
        assert b" 408 " in connection.recv(1000)
        connection.close()
    assert server.ask(data=picture)[0] == 200
    assert server.ask(data=b"x" * 600_000)[0] == 413
    endless = server.begin(HEAD.format(10**15).encode())
    assert b" 413 " in endless.recv(1000), "before it is read"
    for connection in silent:
        assert b"200" not in connection.recv(1000)
        connection.close()
    assert server.ask(data=picture)[0] == 200


def test_an_aborted_upload_is_no_traceback(server, picture):
    for part in (b"", b"x" * 100_000):
        server.begin(HEAD.format(400_000).encode() + part).close()
    status = 503
    while status == 503:  # until it has seen that they are gone
        status = server.ask(data=picture)[0]
    assert status == 200
    server.log.seek(0)
    assert server.log.read() == ""
