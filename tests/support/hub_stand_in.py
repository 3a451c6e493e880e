"""A server on this machine that answers what huggingface_hub's client asks the hub when it uploads a model."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    summaries: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """What the server holds and was asked. token: the one it takes. answers: status and text by part of a path."""

    token: str
    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Authorization
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)

    def __enter__(self) -> Hub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: Any) -> None:
                """Say nothing."""

            def handle_any(self) -> None:
                path, authorization = urlsplit(self.path).path, self.headers.get("Authorization")
                body = self._body()
                hub.requests.append((self.command, path, authorization))
                status, answer = hub.answer(self.command, path, body, authorization)
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = handle_any

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                chunks = []
                while size := int(self.rfile.readline(), 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(chunks)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, method: str, path: str, body: bytes, authorization: str | None) -> tuple[int, Any]:
        for part, (status, text) in self.answers.items():
            if part in path:
                return status, {"error": text}
        if method == "PUT" and path.startswith("/storage/"):  # as of a signed address, with no token
            self.blobs[path.removeprefix("/storage/")] = body
            return 200, {}
        if authorization != f"Bearer {self.token}":
            return 401, {"error": f"Invalid credentials: {authorization}"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            has_license = "\nlicense:" in json.loads(body)["content"]
            return (200, {}) if has_license else (400, {"errors": [{"message": '"license" is missing'}]})
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3]).removesuffix(".git")
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        return self._of_repository(method, path, body, name, self.repositories[name])

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        status = 409 if name in self.repositories else 200
        self.repositories.setdefault(name, Repository(private=asked.get("visibility") == "private"))
        return status, {"url": f"{self.endpoint}/{name}"}

    def _of_repository(self, method: str, path: str, body: bytes, name: str, repository: Repository) -> tuple[int, Any]:
        if method == "GET" and path == f"/api/models/{name}":
            return 200, {"id": name, "private": repository.private, "siblings": []}
        if path == f"/api/models/{name}/preupload/main":
            return 200, {"files": [_upload_mode(file["path"]) for file in json.loads(body)["files"]]}
        if path == f"/{name}.git/info/lfs/objects/batch":
            return 200, {"objects": [self._place(name, wanted) for wanted in json.loads(body)["objects"]]}
        if path == f"/{name}/verify":
            wanted = json.loads(body)
            blob = self.blobs[wanted["oid"]]
            whole = hashlib.sha256(blob).hexdigest() == wanted["oid"] and len(blob) == wanted["size"]
            return (200, {}) if whole else (422, {"error": "not what was announced"})
        if path == f"/api/models/{name}/commit/main":
            self._commit(repository, [json.loads(line) for line in body.splitlines()])
            return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}
        return 404, {"error": f"the stand-in knows no {method} {path}"}

    def _place(self, name: str, wanted: dict[str, Any]) -> dict[str, Any]:
        actions = {
            "upload": {"href": f"{self.endpoint}/storage/{wanted['oid']}"},
            "verify": {"href": f"{self.endpoint}/{name}/verify"},
        }
        return {**wanted, "actions": actions}

    def _commit(self, repository: Repository, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.summaries.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile", line
                repository.files[value["path"]] = self.blobs[value["oid"]]


def _upload_mode(path: str) -> dict[str, Any]:
    return {
        "path": path,
        "uploadMode": "lfs" if path.endswith(".safetensors") else "regular",
        "shouldIgnore": False,
        "oid": None,
    }
