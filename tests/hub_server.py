"""A stand-in for the Hugging Face hub on this machine: the part of its API that downloading and pushing use."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_known"
"""Whoever sends it may read private models and push."""


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Hub:
    """Models by owner/name, each with its files, and every request that came.

    Attributes
    ----------
    models : owner/name → name of a file → content
    hidden : models that are private, and models that ask for consent
    asked : (method, path) of each request
    """

    def __init__(self):
        self.models: dict[str, dict[str, bytes]] = {}
        self.hidden: dict[str, str] = {}
        self.asked: list[tuple[str, str]] = []

    def add(self, name: str, folder: Path) -> None:
        self.models[name] = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        self.models[name][".gitattributes"] = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"  # the hub adds it


class Answer(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, status: int, content: object = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.send(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def handle_any(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command == "POST":
            return self.pushed(path, body) if is_known else self.refuse(401, "Unauthorized")
        words = path.strip("/").split("/")
        words = words[2:] if words[:2] == ["api", "models"] else words
        name, rest = "/".join(words[:2]), words[2:]
        if name not in hub.models or (hub.hidden.get(name) == "private" and not is_known):
            return self.refuse(404 if is_known else 401, "RepoNotFound")
        if hub.hidden.get(name) == "gated" and not is_known:
            return self.refuse(401, "GatedRepo")
        files = hub.models[name]
        if rest[:1] in (["revision"], ["tree"], ["resolve"]) and rest[1] not in ("main", commit_of(files)):
            return self.refuse(404, "RevisionNotFound")
        if rest[0] == "revision":
            siblings = [{"rfilename": file} for file in files]
            return self.send(200, {"id": name, "sha": commit_of(files), "siblings": siblings})
        if rest[0] == "tree":
            sizes = [{"type": "file", "path": file, "size": len(x), "oid": "0" * 40} for file, x in files.items()]
            return self.send(200, sizes)
        content = files[rest[2]]
        tag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self.send(200, content, ETag=tag, X_Repo_Commit=commit_of(files))

    do_GET = do_HEAD = do_POST = handle_any

    def pushed(self, path: str, body: bytes) -> None:
        hub, words = self.server.hub, path.strip("/").split("/")
        address = f"http://127.0.0.1:{self.server.server_port}"
        if path == "/api/validate-yaml":
            return self.send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] == "stranger":
                return self.refuse(403, "Forbidden")
            if asked.get("private") or asked.get("visibility") == "private":
                hub.hidden[name] = "private"
            hub.models.setdefault(name, {})
            return self.send(200, {"url": f"{address}/{name}", "id": name})
        name = "/".join(words[2:4])
        if words[4] == "preupload":
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return self.send(200, {"files": modes})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                hub.models[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = commit_of(hub.models[name])
        return self.send(200, {"commitUrl": f"{address}/{name}/commit/{commit}", "commitOid": commit})


@contextmanager
def serve() -> Iterator[tuple[Hub, str]]:
    """Within the block, a hub answers at an address of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.hub = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
