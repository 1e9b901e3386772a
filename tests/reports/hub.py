"""A stand-in for the Hugging Face hub on loopback: repositories, LFS, commits, downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from coca_scale.inference.demo import listen

GOOD, READ_ONLY = "hf_good", "hf_read_only"


class Hub:
    """What it was sent; only the token `GOOD` may write."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[str] = []
        self.requests: list[str] = []
        self.address = ""
        self._large: dict[str, bytes] = {}
        repo = "/{org}/{name}"
        self.app = Starlette(
            routes=[
                Route("/api/repos/create", self._create, methods=["POST"]),
                Route("/api/validate-yaml", self._validate, methods=["POST"]),
                Route(f"/api/models{repo}/preupload/main", self._preupload, methods=["POST"]),
                Route(f"/api/models{repo}/commit/main", self._commit, methods=["POST"]),
                Route(f"/api/models{repo}", self._info),
                Route(f"/api/models{repo}/revision/main", self._info),
                Route(f"{repo}.git/info/lfs/objects/batch", self._batch, methods=["POST"]),
                Route("/large/{oid}", self._put, methods=["PUT"]),
                Route(f"{repo}/resolve/{{revision}}/{{path:path}}", self._resolve),
            ]
        )

    def _refusal(self, request: Request) -> Response | None:
        self.requests.append(f"{request.method} {request.url.path}")
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token == GOOD:
            return None
        status = 403 if token == READ_ONLY else 401
        return JSONResponse({"error": "no"}, status)

    async def _create(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        asked = await request.json()
        repo = f"{asked['organization']}/{asked['name']}"
        known = repo in self.files
        if not known:
            self.files[repo] = {}
            self.private[repo] = bool(asked.get("private") or asked.get("visibility") == "private")
        url = {"url": f"{self.address}/{repo}", "id": repo}
        return JSONResponse({**url, "error": "exists"} if known else url, 409 if known else 200)

    async def _validate(self, request: Request) -> Response:
        self.requests.append(request.url.path)
        return JSONResponse({"errors": [], "warnings": []})

    async def _preupload(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        files = [
            {"path": f["path"], "uploadMode": "lfs" if f["size"] > 10_000 else "regular"}
            for f in (await request.json())["files"]
        ]
        return JSONResponse({"files": [{**f, "shouldIgnore": False, "oid": None} for f in files]})

    async def _batch(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.address}/large/{o['oid']}"}}}
            for o in (await request.json())["objects"]
        ]
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def _put(self, request: Request) -> Response:
        content = await request.body()
        oid = request.path_params["oid"]
        assert hashlib.sha256(content).hexdigest() == oid
        self._large[oid] = content
        return Response()

    async def _commit(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        repo = "{org}/{name}".format(**request.path_params)
        for line in (await request.body()).splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.commits.append(value["summary"])
            elif entry["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            else:
                assert entry["key"] == "lfsFile"
                self.files[repo][value["path"]] = self._large[value["oid"]]
        url = f"{self.address}/{repo}/commit/{self._revision()}"
        return JSONResponse({"commitUrl": url, "commitOid": self._revision(), "success": True})

    def _revision(self) -> str:
        return f"{len(self.commits):040x}"

    async def _info(self, request: Request) -> Response:
        self.requests.append(f"{request.method} {request.url.path}")
        repo = "{org}/{name}".format(**request.path_params)
        if repo not in self.files:
            return JSONResponse({"error": "none"}, 404, {"X-Error-Code": "RepoNotFound"})
        names = [{"rfilename": name} for name in self.files[repo]]
        return JSONResponse(
            {
                "id": repo,
                "modelId": repo,
                "sha": self._revision(),
                "siblings": names,
                "private": False,
                "tags": [],
            }
        )

    async def _resolve(self, request: Request) -> Response:
        repo = "{org}/{name}".format(**request.path_params)
        content = self.files.get(repo, {}).get(request.path_params["path"])
        if content is None:
            return Response(status_code=404, headers={"X-Error-Code": "EntryNotFound"})
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": self._revision(),
            "Content-Length": str(len(content)),
        }
        if request.method == "HEAD":
            return Response(headers=headers)
        return Response(content, headers=headers, media_type="application/octet-stream")


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that listens on a free port of loopback."""
    hub = Hub()
    socket = listen("127.0.0.1", 0)
    hub.address = f"http://127.0.0.1:{socket.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(hub.app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join()
