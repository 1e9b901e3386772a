"""A web page of one's own for one model: a picture in, captions and scores of labels out."""

from __future__ import annotations

import html
import socket
import threading
import time
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

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


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        upload_bytes: of a picture file.
        waiting: requests at a time; more are turned away.
    """

    upload_bytes: int = 20_000_000
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


def make_app(
    describer: Describer, name: str, limits: Limits, hosts: tuple[str, ...] | None = LOOPBACK
) -> Starlette:
    """The page and what it calls.

    Args:
        describer: answers.
        name: of the model, for the page.
        limits: of requests.
        hosts: host names that a request may be addressed to, so that no other web page can reach a
            server on loopback; None takes any.
    """
    template = files("coca_scale.inference").joinpath(_PAGE).read_text(encoding="utf-8")
    busy = threading.BoundedSemaphore(limits.waiting)

    async def page(_: Request) -> Response:
        return HTMLResponse(template.replace("{{ model }}", html.escape(name)))

    async def describe(request: Request) -> Response:
        labels = [label.strip() for label in request.query_params.getlist("label")]
        labels = [label for label in labels if label]
        if len(labels) > MOST_LABELS or any(len(label) > MOST_CHARACTERS for label in labels):
            most = f"at most {MOST_LABELS} labels of {MOST_CHARACTERS} characters"
            return _refusal(413, most)
        data = await _body(request, limits.upload_bytes)
        if data is None:
            return _refusal(413, f"the file is larger than {limits.upload_bytes / 1e6:.0f} MB")
        if not busy.acquire(blocking=False):
            return _refusal(503, "too many pictures at a time; try again")
        try:
            return JSONResponse(await run_in_threadpool(describer.describe, data, labels))
        except BadSample as bad:
            return _refusal(415, f"this file cannot be used: {bad.cause.replace('_', ' ')}")
        finally:
            busy.release()

    middleware = []
    if hosts is not None:
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts)))
    routes = [Route("/", page), Route("/api/describe", describe, methods=["POST"])]
    return Starlette(routes=routes, middleware=middleware)


async def _body(request: Request, most: int) -> bytes | None:
    """What was sent, None if it is more than `most` bytes, of which no more are kept.

    The rest is read all the same, up to a point: a browser that is still sending when the server
    hangs up shows a broken connection and not the answer.
    """
    data, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= most:
            data += chunk
        elif size > _READ_ON * most:
            break
    return bytes(data) if size <= most else None


def _refusal(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status)
