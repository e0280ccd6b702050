"""A fake hub on a local port: the endpoints that its client uses to upload and download a critic."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

import pytest
import yaml

TOKEN = "hf_may_write"


class Hub(ThreadingHTTPServer):
    """Repositories by id, each with its branches by name, each with its commits: an id, and the files by path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.repositories: dict[str, dict[str, list[tuple[str, dict[str, bytes]]]]] = {}
        self.private: set[str] = set()
        self.messages: list[str] = []

    @property
    def url(self) -> str:
        """The value of `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the last commit of a branch, or the commit with this id."""
        branches = self.repositories[repo]
        if revision in branches:
            return branches[revision][-1] if branches[revision] else ("0" * 40, {})
        return next((one for commits in branches.values() for one in commits if one[0] == revision), None)


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        """Log nothing."""

    def answer(self, status: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, what: str) -> None:
        self.answer(404, {"error": f"{what} not found"}, X_Error_Code=f"{what}NotFound")

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        path = urlparse(self.path).path
        if path == "/api/validate-yaml":
            header = yaml.safe_load(json.loads(sent)["content"].split("---")[1])
            sound = isinstance(header, dict) and isinstance(header.get("library_name"), str)
            self.answer(200 if sound else 400, {"errors": [] if sound else [{"message": "no library"}], "warnings": []})
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid username or password."})
            return
        if path == "/api/repos/create":
            asked = json.loads(sent)
            repo = f"{asked['organization'] or 'somebody'}/{asked['name']}"
            if asked.get("private") or asked.get("visibility") == "private":
                self.server.private.add(repo)
            known = repo in self.server.repositories
            self.server.repositories.setdefault(repo, {"main": []})
            self.answer(409 if known else 200, {"url": f"{self.server.url}/{repo}", "name": repo})
            return
        _, _, _, owner, name, what, revision = path.split("/")
        repo, branch = f"{owner}/{name}", unquote(revision)
        branches = self.server.repositories[repo]
        if what == "branch":
            known = branch in branches
            branches.setdefault(branch, list(branches["main"]))
            self.answer(409 if known else 200, {})
        elif what == "preupload":
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer(200, {"files": [{"path": file["path"], **modes} for file in json.loads(sent)["files"]]})
        elif what == "commit":
            lines = [json.loads(line) for line in sent.splitlines()]
            added = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            self.server.messages += [line["value"]["summary"] for line in lines if line["key"] == "header"]
            before = branches[branch][-1][1] if branches[branch] else {}
            oid = hashlib.sha1(sent + str(len(branches[branch])).encode()).hexdigest()
            branches[branch].append((oid, before | added))
            done = {"success": True, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid}
            self.answer(200, done | {"hookOutput": ""})
        else:
            self.missing("Entry")

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlparse(self.path).path.split("/")[1:]]
        api = parts[0] == "api"
        repo = "/".join(parts[2:4] if api else parts[:2])
        if repo not in self.server.repositories:
            self.missing("Repo")
            return
        what, rest = (parts[4:5] or [""])[0] if api else parts[2], parts[5:] if api else parts[3:]
        found = self.server.commit(repo, (rest or ["main"])[0])
        if found is None:
            self.missing("Revision")
            return
        oid, files = found
        if what == "tree":
            self.answer(
                200,
                [
                    {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for path, content in files.items()
                ],
            )
        elif what == "resolve":
            content = files.get("/".join(rest[1:]))
            if content is None:
                self.missing("Entry")
                return
            self.answer(200, content, X_Repo_Commit=oid, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
        else:
            siblings = [{"rfilename": path} for path in files]
            self.answer(
                200,
                {"_id": "0", "id": repo, "sha": oid, "private": repo in self.server.private}
                | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0},
            )

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[Hub]:
    """An empty hub, with `TOKEN` for write access."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
