"""An HTTP proxy on loopback that does to answers what networks do."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("reset", None, "truncate", "503", None, "slow", "stall")


class FaultyProxy:
    """Forwards to `port`; answers about shards break in turn, as long as `active`."""

    def __init__(self, port):
        self.active = True
        self.done = Counter()
        turns = itertools.cycle(FAULTS)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                upstream = http.client.HTTPConnection("127.0.0.1", port)
                size = int(self.headers.get("Content-Length", 0))
                body = self.rfile.read(size)
                upstream.request(self.command, self.path, body, dict(self.headers))
                answer = upstream.getresponse()
                content = answer.read()
                fault = next(turns) if proxy.active and ".tar" in self.path else None
                if fault is not None:
                    proxy.done[fault] += 1
                with contextlib.suppress(OSError):  # the client may have given up
                    self.reply(answer, content, fault)

            do_HEAD = do_PUT = do_POST = do_GET

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
        self._server.shutdown()
        self._server.server_close()
