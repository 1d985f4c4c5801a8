"""A stand-in for the Hugging Face Hub: what its HTTP interface answers to push and pull, with repositories in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"


class Hub(ThreadingHTTPServer):
    """Repositories by OWNER/NAME: whether each is private, and its branches' files."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.private: dict[str, bool] = {}
        self.branches: dict[tuple[str, str], dict[str, bytes]] = {}
        self.cards: list[str] = []  # that were validated
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, text: str) -> None:
        self.answer({"error": text}, status, {"X-Error-Code": code, "X-Error-Message": text})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        about = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?/?", path)
        found = resolve or about
        if found is None:
            return self.refuse(404, "", f"no such page: {path}")
        repo = found[1]
        revision = (resolve[2] if resolve else about and about[3]) or "main"
        if repo not in self.server.private or (self.server.private[repo] and not self.knows()):
            return self.refuse(401, "RepoNotFound", "Repository not found")
        commits = {self.commit(repo, branch): branch for one, branch in self.server.branches if one == repo}
        files = self.server.branches.get((repo, commits.get(revision, revision)))
        if files is None:
            return self.refuse(404, "RevisionNotFound", "Revision not found")
        if resolve:
            if resolve[3] not in files:
                return self.refuse(404, "EntryNotFound", "Entry not found")
            content = files[resolve[3]]
            etag = hashlib.sha256(content).hexdigest()
            return self.answer(content, headers={"ETag": f'"{etag}"', "X-Repo-Commit": self.commit(repo, revision)})
        assert about
        if about[2] == "tree":
            listed = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            return self.answer(listed)
        siblings = [{"rfilename": name} for name in files]
        self.answer(
            {
                "id": repo,
                "modelId": repo,
                "private": self.server.private[repo],
                "sha": self.commit(repo, revision),
                "siblings": siblings,
                "tags": [],
            }
        )
        return None

    def do_POST(self) -> None:
        body = self.read_body()
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            return self.answer({"errors": [], "warnings": []})
        if not self.knows():
            return self.refuse(401, "", "Invalid username or password.")
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if repo in self.server.private:
                return self.answer({"error": "You already created it", "url": f"{self.server.address}/{repo}"}, 409)
            self.server.private[repo] = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.server.branches[repo, "main"] = {".gitattributes": b""}
            return self.answer({"url": f"{self.server.address}/{repo}", "id": repo, "name": repo})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/([^/]+)", path)
        assert found, path
        repo, what, branch = found.groups()
        if what == "branch":
            self.server.branches[repo, branch] = dict(self.server.branches[repo, "main"])
            return self.answer({})
        if what == "preupload":
            modes = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self.answer({"files": modes})
        for line in body.splitlines():
            change = json.loads(line)
            value = change["value"]
            if change["key"] == "deletedFile":
                del self.server.branches[repo, branch][value["path"]]
            elif change["key"] == "file":
                self.server.branches[repo, branch][value["path"]] = base64.b64decode(value["content"])
        commit = self.commit(repo, branch)
        self.answer(
            {"commitOid": commit, "commitUrl": f"{self.server.address}/{repo}/commit/{commit}", "success": True}
        )
        return None

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def knows(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def commit(self, repo: str, revision: str) -> str:
        files = self.server.branches.get((repo, revision))
        return revision if files is None else hashlib.sha1(repr((revision, sorted(files.items()))).encode()).hexdigest()


if __name__ == "__main__":
    hub = Hub(int(sys.argv[1]))
    print(hub.address, flush=True)
    threading.Event().wait()
