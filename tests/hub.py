"""A stand-in for the Hugging Face Hub: a real server on this machine, and what can go wrong with one.

It speaks what huggingface_hub asks for when it pulls a model: the description of a repository at a revision, HEAD and
GET of files with ETag, commit, size and ranges. Large files are sent from another address, as the Hub does.
"""

import hashlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

__all__ = ["Remote", "StandIn", "serving"]

_LARGE = (".safetensors", ".gguf", ".onnx", ".bin")  # what the real one keeps outside Git
_PIECE = 1 << 16


@dataclass
class Remote:
    """A repository: its files, and what its description says."""

    files: dict[str, bytes]
    license: str | None = "apache-2.0"
    architecture: str | None = None
    gated: bool = False

    @property
    def commit(self) -> str:
        """Changes with the files, as commits do."""
        parts = (name.encode() + content for name, content in sorted(self.files.items()))
        return hashlib.sha1(b"".join(parts)).hexdigest()

    def describe(self, repo: str) -> dict[str, object]:
        """What ``/api/models`` answers."""
        card = {"license": self.license} if self.license else {}
        gguf = {"architecture": self.architecture} if self.architecture else None
        return {
            "id": repo,
            "sha": self.commit,
            "cardData": card,
            "gguf": gguf,
            "siblings": [_sibling(name, content) for name, content in self.files.items()],
        }


@dataclass
class StandIn:
    """The server's repositories, its faults, and what it was asked for.

    Attributes:
        status: answered in place of anything whose path holds this text.
        cut: closes the connection after so many bytes of a file's body; each number is used once.
        pause_s: rest after each 64 KiB of a body.
        spoilt: names of files that are sent with one byte changed.
        sent: bytes of bodies, by file.
        asked: method and path of every request.
    """

    repos: dict[str, Remote] = field(default_factory=dict)
    status: dict[str, int] = field(default_factory=dict)
    cut: dict[str, list[int]] = field(default_factory=dict)
    pause_s: float = 0.0
    spoilt: set[str] = field(default_factory=set)
    sent: Counter[str] = field(default_factory=Counter)
    asked: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""
    n_open: int = 0  # bodies that are being sent


@contextmanager
def serving() -> Iterator[StandIn]:
    """Run a server until the block ends."""
    state = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: StandIn
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Tests look at ``asked`` instead."""

    def _answer(self) -> None:
        path = unquote(self.path.partition("?")[0])
        self.state.asked.append((self.command, path))
        for part, status in self.state.status.items():
            if part in path:
                return self._refuse(status, "")
        if found := re.fullmatch(r"/api/models/(.+)/revision/(.+)", path):
            return self._describe(*found.groups())
        if found := re.fullmatch(r"/api/models/(.+)/tree/(.+)", path):
            return self._list(*found.groups())
        if found := re.fullmatch(r"/(stored/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(*found.groups())
        return self._refuse(404, "")

    def _describe(self, repo: str, revision: str) -> None:
        remote = self.state.repos.get(repo)
        if remote is None:
            return self._refuse(401, "RepoNotFound")
        if revision not in ("main", remote.commit):
            return self._refuse(404, "RevisionNotFound")
        return self._send(200, json.dumps(remote.describe(repo)).encode(), {})

    def _list(self, repo: str, commit: str) -> None:
        remote = self.state.repos[repo]
        assert commit == remote.commit
        tree = []
        for name, content in remote.files.items():
            etag = _etag(name, content)
            large = {"lfs": {"oid": etag, "size": len(content), "pointerSize": 134}} if name.endswith(_LARGE) else {}
            tree.append({"type": "file", "path": name, "oid": etag, "size": len(content), **large})
        return self._send(200, json.dumps(tree).encode(), {})

    def _file(self, stored: str | None, repo: str, revision: str, name: str) -> None:
        remote = self.state.repos.get(repo)
        if remote is None:
            return self._refuse(401, "RepoNotFound")
        if remote.gated:
            return self._refuse(403, "GatedRepo")
        if revision not in ("main", remote.commit):
            return self._refuse(404, "RevisionNotFound")
        if name not in remote.files:
            return self._refuse(404, "EntryNotFound")
        content = remote.files[name]
        about = {"X-Repo-Commit": remote.commit, "ETag": f'"{_etag(name, content)}"', "Accept-Ranges": "bytes"}
        if name.endswith(_LARGE) and not stored:
            about |= {"X-Linked-Etag": about.pop("ETag"), "X-Linked-Size": str(len(content))}
            return self._send(302, b"", {**about, "Location": f"{self.state.url}/stored{self.path}"})
        if name in self.state.spoilt:
            content = bytes([content[0] ^ 1]) + content[1:]
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), min(int(found[2] or len(content)), len(content) - 1)
            about["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._send(206, content[first : last + 1], about, name)
        return self._send(200, content, about, name)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], name: str = "") -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = self.state.cut.get(name)
        whole = len(body)
        body = body[: cuts.pop(0)] if cuts else body
        self.state.n_open += 1
        for start in range(0, len(body), _PIECE):
            self.state.sent[name] += len(body[start : start + _PIECE])
            try:
                self.wfile.write(body[start : start + _PIECE])
            except OSError:  # the other side has gone
                break
            if self.state.pause_s:
                time.sleep(self.state.pause_s)
        self.state.n_open -= 1
        if len(body) < whole:
            self.close_connection = True


def _etag(name: str, content: bytes) -> str:
    """What the Hub names a file by: SHA-256 of a large one, Git's name of another."""
    if name.endswith(_LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sibling(name: str, content: bytes) -> dict[str, object]:
    etag = _etag(name, content)
    large = {"sha256": etag, "size": len(content), "pointerSize": 134} if name.endswith(_LARGE) else None
    return {"rfilename": name, "size": len(content), "blobId": etag, "lfs": large}
