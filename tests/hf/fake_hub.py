"""A Hugging Face hub of one process: the requests that huggingface_hub makes to upload and download a model."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class FakeHub:
    """Repositories by name, each with its commits and the branches that point to them."""

    endpoint: str = ""
    token: str = "hf_secret"
    commits: dict[tuple[str, str], Files] = field(default_factory=dict)
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)

    def find(self, repo_id: str, revision: str) -> tuple[str, Files] | None:
        """Return a revision's commit and files."""
        sha = self.branches.get((repo_id, revision), revision)
        return (sha, self.commits[repo_id, sha]) if (repo_id, sha) in self.commits else None

    def commit(self, repo_id: str, branch: str, added: Files) -> str:
        """Add files to a branch."""
        present = self.find(repo_id, branch)
        content = {**(present[1] if present else {}), **added}
        sha = hashlib.sha1(repr(sorted(content.items())).encode()).hexdigest()
        self.commits[repo_id, sha], self.branches[repo_id, branch] = content, sha
        return sha


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _reply(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _json(self, value: Any, status: int = 200, **headers: str) -> None:
            self._reply(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

        def _is_authorized(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {hub.token}"

        def do_POST(self) -> None:
            path = urlsplit(self.path).path
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.requests.append(f"POST {path}")
            if path == "/api/validate-yaml":
                self._json({"errors": [], "warnings": []})
            elif not self._is_authorized():
                self._json({"error": "Invalid username or password."}, 401)
            elif path == "/api/repos/create":
                request = json.loads(body)
                repo_id = f"{request.get('organization') or 'user'}/{request['name']}"
                if request.get("private") or request.get("visibility") == "private":
                    hub.private.add(repo_id)
                hub.commit(repo_id, "main", {})
                self._json({"url": f"{hub.endpoint}/{repo_id}"})
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
                hub.branches[match[1], unquote(match[2])] = hub.branches[match[1], "main"]
                self._json({})
            elif re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
                names = [entry["path"] for entry in json.loads(body)["files"]]
                modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
                self._json({"files": modes})
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
                values = [json.loads(line) for line in body.splitlines() if line]
                added = {
                    entry["value"]["path"]: base64.b64decode(entry["value"]["content"])
                    for entry in values
                    if entry["key"] == "file"
                }
                sha = hub.commit(match[1], unquote(match[2]), added)
                self._json({"commitUrl": f"{hub.endpoint}/{match[1]}/commit/{sha}", "commitOid": sha, "success": True})
            else:
                self._json({"error": "Not found"}, 404)

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            hub.requests.append(f"{self.command} {path}")
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
                repo_id, kind, revision = match[1], match[2], unquote(match[3] or "main")
                present = hub.find(repo_id, revision)
                is_hidden = repo_id in hub.private and not self._is_authorized()
                if is_hidden or not any(name == repo_id for name, _ in hub.branches):
                    self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
                elif present is None:
                    self._json({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
                elif kind == "tree":
                    entries = [
                        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for name, data in present[1].items()
                    ]
                    self._json(entries, X_Repo_Commit=present[0])
                else:
                    siblings = [{"rfilename": name} for name in present[1]]
                    self._json({"id": repo_id, "sha": present[0], "siblings": siblings, "private": False, "tags": []})
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                present = hub.find(match[1], unquote(match[2]))
                name = unquote(match[3])
                if present is None or name not in present[1]:
                    self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
                    return
                data = present[1][name]
                etag = f'"{hashlib.sha1(data).hexdigest()}"'
                self._reply(data, ETag=etag, X_Repo_Commit=present[0], Content_Type="application/octet-stream")
            else:
                self._json({"error": "Not found"}, 404)

        do_HEAD = do_GET

    return Handler


@contextmanager
def serve() -> Iterator[FakeHub]:
    """Serve an empty hub on a free port."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
