"""A web page of one's own for one model: a picture in, captions and scores of labels out."""

from __future__ import annotations

import asyncio
import html
import ipaddress
import socket
import threading
import time
from dataclasses import dataclass
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from coca_scale.data.images import decode_image
from coca_scale.data.sample import BadSample
from coca_scale.errors import UserError
from coca_scale.inference.generate import generate
from coca_scale.inference.generation_options import GenerationOptions
from coca_scale.inference.load import LoadedModel

LOOPBACK = ("127.0.0.1", "localhost")
MOST_LABELS = 100
MOST_CHARACTERS = 300
_PAGE = "demo.html"
_READ_ON = 20  # times the limit
_MOST_CONNECTIONS = 128
_SILENT_SECONDS = 10.0  # that a connection may be open without a whole request


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        upload_bytes: of a picture file.
        upload_seconds: longest wait for the whole of it.
        waiting: pictures that are sent or looked at, at a time; more are turned away.
    """

    upload_bytes: int = 20_000_000
    upload_seconds: float = 60.0
    waiting: int = 8


class Describer:
    """A model that looks at one picture at a time."""

    def __init__(self, loaded: LoadedModel, options: GenerationOptions) -> None:
        """`options.samples` captions are shown."""
        self._loaded = loaded
        self._options = options
        self._one_at_a_time = threading.Lock()

    def describe(self, data: bytes, labels: list[str]) -> dict[str, Any]:
        """Captions with their scores, and the probability of each label among them.

        Raises:
            BadSample: not a picture, too small or too large.
        """
        picture = self._loaded.preprocess(decode_image(data, "picture"))[None]
        started = time.perf_counter()
        with self._one_at_a_time, torch.no_grad():
            captions = self._captions(picture)
            scored = self._labels(picture, labels) if labels else []
        seconds = time.perf_counter() - started
        return {"captions": captions, "labels": scored, "seconds": round(seconds, 3)}

    def _captions(self, picture: torch.Tensor) -> list[dict[str, Any]]:
        coca, tokenizer = self._loaded.model.coca, self._loaded.tokenizer
        if coca.decoder is None:
            return []
        written = generate(coca, picture, tokenizer, self._options)
        rows = zip(written.tokens_BNL[0].tolist(), written.scores_BN[0].tolist(), strict=True)
        return [{"text": tokenizer.decode(ids), "score": round(s, 3)} for ids, s in rows]

    def _labels(self, picture: torch.Tensor, labels: list[str]) -> list[dict[str, Any]]:
        image = self._loaded.encode_image(picture)
        texts = self._loaded.encode_text(self._loaded.tokenizer(labels))
        scale = self._loaded.model.logit_scale()
        chances = (scale * (image @ texts.T).float()).softmax(-1)[0].tolist()
        found = [
            {"text": t, "probability": round(p, 4)} for t, p in zip(labels, chances, strict=True)
        ]
        return sorted(found, key=lambda item: -item["probability"])


def listen(host: str, port: int) -> socket.socket:
    """A socket that is open before the model is loaded.

    Raises:
        UserError: the address is not this machine's, or taken.
    """
    try:
        return socket.create_server((host, port))
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another --port or --host"
        ) from error


def make_app(describer: Describer, name: str, limits: Limits, host: str) -> Starlette:
    """The page and what it calls.

    Args:
        describer: answers.
        name: of the model, for the page.
        limits: of requests.
        host: that is listened on; what requests may be addressed to follows from it.
    """
    template = files("coca_scale.inference").joinpath(_PAGE).read_text(encoding="utf-8")
    busy = threading.BoundedSemaphore(limits.waiting)

    async def page(request: Request) -> Response:
        if not _is_for(request, host):
            return _refusal(400, "this server does not go by that name")
        return HTMLResponse(template.replace("{{ model }}", html.escape(name)))

    async def describe(request: Request) -> Response:
        if not _is_for(request, host):
            return _refusal(400, "this server does not go by that name")
        if not _is_from_page(request):
            return _refusal(403, "only the page of this server may ask")
        labels = [label.strip() for label in request.query_params.getlist("label")]
        labels = [label for label in labels if label]
        if len(labels) > MOST_LABELS or any(len(label) > MOST_CHARACTERS for label in labels):
            most = f"at most {MOST_LABELS} labels of {MOST_CHARACTERS} characters"
            return _refusal(413, most)
        if not busy.acquire(blocking=False):  # before anything is read
            await _received(request, 0, limits)
            return _refusal(503, "too many pictures at a time; try again")
        try:
            data = await _received(request, limits.upload_bytes, limits)
            if isinstance(data, Response):
                return data
            return JSONResponse(await run_in_threadpool(describer.describe, data, labels))
        except BadSample as bad:
            return _refusal(415, f"this file cannot be used: {bad.cause.replace('_', ' ')}")
        finally:
            busy.release()

    return Starlette(routes=[Route("/", page), Route("/api/describe", describe, methods=["POST"])])


def serve(site: Starlette, listening: socket.socket) -> None:
    """Answer until ctrl-c."""
    config = uvicorn.Config(site, http=_Impatient, log_level="warning")
    uvicorn.Server(config).run(sockets=[listening])


class _Impatient(H11Protocol):
    """Connections that are few, and closed where no request comes.

    uvicorn itself waits for ever for the rest of a header.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _MOST_CONNECTIONS:
            transport.abort()
        else:
            self.loop.call_later(_SILENT_SECONDS, self._look, None)

    def _look(self, before: object) -> None:
        """Close what is where it was the last time, with no request between."""
        if self.transport.is_closing():
            return
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is before:
            self.transport.abort()
        else:
            self.loop.call_later(_SILENT_SECONDS, self._look, self.cycle)


def _is_for(request: Request, listened: str) -> bool:
    """Whether a request names this server, and not a name somebody else lets point here.

    Pages of others reach a server by such a name, and then count as its own. On loopback only
    loopback is meant, through a tunnel too; else any address, as those cannot be made to point
    elsewhere, and the names of this machine.
    """
    name = _host(request.headers.get("host", ""))
    if name in LOOPBACK:
        return True
    if listened in LOOPBACK:
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name == listened.lower() or name.partition(".")[0] == _short_name()
    return True


def _is_from_page(request: Request) -> bool:
    """Whether a browser that sends this shows our page; programs say nothing of where they are."""
    origin = request.headers.get("origin")
    site = request.headers.get("sec-fetch-site", "none")
    if site not in ("same-origin", "none"):
        return False
    return origin is None or origin.partition("://")[2] == request.headers.get("host")


def _host(address: str) -> str:
    """The host of HOST:PORT or [HOST]:PORT, in small letters; nothing of what is neither."""
    try:
        parts = urlsplit(f"//{address}")
    except ValueError:
        return ""
    return "" if "@" in parts.netloc else parts.hostname or ""


def _short_name() -> str:
    return socket.gethostname().partition(".")[0].lower()


async def _received(request: Request, most: int, limits: Limits) -> bytes | Response:
    """What was sent, or what there is to say instead; no more than `most` bytes are kept.

    The rest is read all the same, up to a point: a browser that is still sending when the server
    hangs up shows a broken connection and not the answer.
    """
    too_large = _refusal(413, f"the file is larger than {most / 1e6:.0f} MB")
    try:
        if int(request.headers.get("content-length", 0)) > _READ_ON * limits.upload_bytes:
            return too_large
        data = await asyncio.wait_for(
            _body(request, most, _READ_ON * limits.upload_bytes), limits.upload_seconds
        )
    except asyncio.TimeoutError:
        return _refusal(408, f"the file did not arrive within {limits.upload_seconds:.0f} s")
    except ClientDisconnect:
        return Response(status_code=400)  # which nobody reads
    return too_large if data is None else data


async def _body(request: Request, most: int, furthest: int) -> bytes | None:
    data, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= most:
            data += chunk
        elif size > furthest:
            break
        else:
            data.clear()
    return bytes(data) if size <= most else None


def _refusal(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status)
