"""A hub on this machine: as much of its HTTP interface as the real client needs to push a folder and to fetch it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import huggingface_hub
import pytest
import transformers.utils.hub

Repositories = dict[str, list[dict[str, bytes]]]
"""Every repository's files, as each commit to it left them."""


def _oid(number: int) -> str:
    return f"{number:040x}"


class _Hub(BaseHTTPRequestHandler):
    repositories: Repositories

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or self._chunks()
        match unquote(self.path).partition("?")[0].split("/")[1:]:
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                self.repositories.setdefault(name, [{}])
                self._answer({"url": f"http://{self.headers['Host']}/{name}", "name": name})
            case ["api", "validate-yaml"]:
                self._answer({"errors": [], "warnings": []})
            case ["api", "models", _, _, "preupload", _]:
                files = [file["path"] for file in json.loads(body)["files"]]
                self._answer(
                    {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files]}
                )
            case ["api", "models", user, name, "commit", _]:
                commits = self.repositories[f"{user}/{name}"]
                files = dict(commits[-1])
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                    elif entry["key"] == "deletedFile":
                        del files[entry["value"]["path"]]
                commits.append(files)
                oid = _oid(len(commits) - 1)
                url = f"http://{self.headers['Host']}/{user}/{name}/commit/{oid}"
                self._answer({"commitUrl": url, "commitOid": oid})
            case _:
                self._answer({"error": self.path}, 404)

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_GET(self) -> None:
        match unquote(self.path).partition("?")[0].split("/")[1:]:
            case ["api", "models", user, name, "revision", _] if f"{user}/{name}" in self.repositories:
                commits = self.repositories[f"{user}/{name}"]
                self._answer({"id": f"{user}/{name}", "sha": _oid(len(commits) - 1), "siblings": []})
            case ["api", "models", user, name, "tree", *_]:
                files = self.repositories[f"{user}/{name}"][-1]
                self._answer(
                    [
                        {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for path, data in files.items()
                    ]
                )
            case [user, name, "resolve", _, *path] if "/".join(path) in self._newest(f"{user}/{name}"):
                commits = self.repositories[f"{user}/{name}"]
                data = commits[-1]["/".join(path)]
                self._answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=_oid(len(commits) - 1))
            case [_, _, "resolve", *_]:
                self._answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=_oid(0))
            case _:
                self._answer(b"", 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def _newest(self, repository: str) -> dict[str, bytes]:
        return self.repositories.get(repository, [{}])[-1]


@contextmanager
def stand_in_hub(patch: pytest.MonkeyPatch, cache: str) -> Iterator[Repositories]:
    """Within, the client knows this hub alone, and keeps what it fetches in ``cache``."""
    repositories: Repositories = {}
    handler = type("Handler", (_Hub,), {"repositories": repositories})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        at = f"http://127.0.0.1:{server.server_port}"
        constants = huggingface_hub.constants
        for name, value in {
            "ENDPOINT": at,
            "HUGGINGFACE_CO_URL_TEMPLATE": at + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": cache,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            patch.setattr(constants, name, value)
        patch.setattr(transformers.utils.hub, "_hf_api", None)
        patch.setenv("NO_PROXY", "*")
        try:
            yield repositories
        finally:
            huggingface_hub.close_session()
            server.shutdown()
