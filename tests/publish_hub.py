"""A hub on this machine: the few requests that an upload makes, answered over real HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_" + "test" * 6  # of no service


class Hub(ThreadingHTTPServer):
    """What was made and committed.

    Attributes:
        repos: `{repo_id: what it was made with}`.
        branches: (repo_id, branch).
        commits: `{(repo_id, branch): {path: content}}`.
        objects: large files by their SHA-256.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.repos: dict[str, dict[str, Any]] = {}
        self.branches: list[tuple[str, str]] = []
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    hub = Hub()
    Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing on the screen."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        content = self._body()
        digest = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == digest
        self.server.objects[digest] = content
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        hub, steps = self.server, self.path.split("?")[0].strip("/").split("/")
        if steps[:2] == ["api", "validate-yaml"]:
            return self._answer({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid username or password."}, 401)
        if steps == ["api", "repos", "create"]:
            made = json.loads(body)
            repo = f"{made.get('organization')}/{made['name']}"
            if repo in hub.repos:
                return self._answer(
                    {"error": "You already created this repo", "url": f"{hub.url}/{repo}"}, 409
                )
            hub.repos[repo] = made
            return self._answer({"url": f"{hub.url}/{repo}"})
        if steps[-2:] == ["objects", "batch"]:
            objects = json.loads(body)["objects"]
            place = {one["oid"]: {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}} for one in objects}
            return self._answer({"objects": [{**one, "actions": place[one["oid"]]} for one in objects]})
        repo, action, branch = "/".join(steps[2:4]), steps[4], steps[5]
        if action == "branch":
            hub.branches.append((repo, branch))
            return self._answer({})
        if action == "preupload":
            files = [
                {"path": one["path"], "uploadMode": _mode(one["path"]), "shouldIgnore": False, "oid": None}
                for one in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        assert action == "commit", self.path
        files = hub.commits.setdefault((repo, branch), {})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = hub.objects[line["value"]["oid"]]
        return self._answer({"commitUrl": f"{hub.url}/{repo}/commit/{'a' * 40}", "commitOid": "a" * 40})


def _mode(path: str) -> str:
    return "lfs" if path.endswith((".safetensors", ".png")) else "regular"
