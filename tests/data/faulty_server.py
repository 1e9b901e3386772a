"""An HTTP proxy on loopback that does to answers what networks do."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.ports import free_port

FAULTS = ("reset", None, "truncate", "503", None, "slow", "stall")
OF_UPLOADS = (*FAULTS, None, "lost")


class FaultyProxy:
    """Forwards to `port`; answers about paths with `about` break in turn, as long as `active`.

    Uploads may be lost before they come to the server. Until it is `opened` nothing is answered,
    and while it is `down` nothing comes to the server.
    """

    def __init__(self, port, about=".tar", faults=FAULTS):
        self.active = True
        self.down = False
        self.opened = threading.Event()
        self.opened.set()
        self.done = Counter()
        turns = itertools.cycle(faults)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                proxy.opened.wait()
                fault = next(turns) if proxy.active and about in self.path else None
                if fault is not None:
                    proxy.done[fault] += 1
                if "Expect" in self.headers:
                    self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                size = int(self.headers.get("Content-Length", 0))
                with contextlib.suppress(OSError):  # of a client that was killed
                    body = self.rfile.read(size // 2 if fault == "lost" else size)
                    if len(body) == size and fault != "lost":
                        self.forward(body, fault)

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

            def forward(self, body, fault):
                if proxy.down:
                    self.send_error(503)
                    return
                upstream = http.client.HTTPConnection("127.0.0.1", port)
                upstream.request(self.command, self.path, body, dict(self.headers))
                answer = upstream.getresponse()
                content = answer.read()
                self.reply(answer, content, fault)

            def reply(self, answer, content, fault):
                if fault == "503":
                    self.send_error(503)
                    return
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("connection", "transfer-encoding", "date", "server"):
                        self.send_header(name, value)
                self.end_headers()
                if fault in ("reset", "truncate"):
                    self.wfile.write(content[: len(content) // 2])
                    if fault == "reset":
                        linger = struct.pack("ii", 1, 0)
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                elif fault == "slow":
                    for byte in content[:20]:
                        self.wfile.write(bytes([byte]))
                        time.sleep(0.1)
                    self.wfile.write(content[20:])
                else:
                    if fault == "stall":
                        time.sleep(1.5)
                    self.wfile.write(content)

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self.opened.set()
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def loopback_s3(about=".tar", faults=FAULTS):
    """An S3 server (moto) with s3://bucket behind a faulty proxy, credentials in the environment.

    Gives a client that reaches it without faults, and the proxy.
    """
    import boto3
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()  # one of an earlier server would be used again
    server = ThreadedMotoServer("127.0.0.1", free_port(), verbose=False)
    server.start()
    proxy = FaultyProxy(server._port, about, faults)
    names = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = dict(os.environ)
    os.environ.update(names)
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{server._port}")
    client.create_bucket(Bucket="bucket")
    try:
        yield client, proxy
    finally:
        os.environ.clear()
        os.environ.update(before)
        proxy.close()
        server.stop()
