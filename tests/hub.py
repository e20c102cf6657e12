"""A stand-in of the Hugging Face hub: one revision, whole and broken answers, and a list of what was asked."""

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".ckpt")  # kept by SHA-256, as git LFS does; all else by git's SHA-1


@dataclass
class Hub:
    """What it serves, and how it fails.

    Args:
        repos: "owner/name" -> file -> content.
        asked: (file, first byte asked for) of every body, in order.
        breaks: file -> how many bytes to send, once, before the connection is cut.
        hangs: it is not cut then, and nothing more comes.
        spoiled: files that are sent with one byte changed.
        status: answered to everything, where it is not 0; with `code` as the hub names the reason.
        headers: leave out none of the hub's headers (False: as some web server answers).
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    asked: list[tuple[str, int]] = field(default_factory=list)
    breaks: dict[str, int] = field(default_factory=dict)
    hangs: bool = False
    spoiled: set[str] = field(default_factory=set)
    status: int = 0
    code: str = ""
    headers: bool = True
    url: str = ""

    def add(self, repo: str, folder: Path) -> None:
        """Serve all files of a folder."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repos.setdefault(repo, {}).update(files)


def git_hash(content: bytes) -> str:
    """What `git hash-object` prints."""
    return hashlib.sha1(b"blob " + str(len(content)).encode() + b"\0" + content).hexdigest()


def stated(name: str, content: bytes) -> str:
    """The ETag of a file on the hub."""
    return hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else git_hash(content)


@contextmanager
def serve() -> Iterator[Hub]:
    """Run one on a free port of this machine, until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.answer()

        def do_GET(self):
            self.answer()

        def answer(self):
            if hub.status:
                return self.say(hub.status, hub.code)
            if found := re.fullmatch(
                rf"/api/models/([^/]+/[^/]+)/(revision|tree)/(?:main|{COMMIT})(?:\?.*)?", self.path
            ):
                return self.list(found[1], found[2])
            found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
            if found is None or found[1] not in hub.repos:
                return self.say(401, "RepoNotFound")
            if found[2] not in ("main", COMMIT):
                return self.say(404, "RevisionNotFound")
            if found[3] not in hub.repos[found[1]]:
                return self.say(404, "EntryNotFound")
            return self.send(found[3], hub.repos[found[1]][found[3]])

        def say(self, status, code):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def list(self, repo, what):
            rows = [
                {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
                for name, content in hub.repos[repo].items()
            ]
            body = json.dumps({"id": repo, "sha": COMMIT} if what == "revision" else rows).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def send(self, name, content):
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            first = int(asked[1]) if asked else 0
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - first))
            if hub.headers:
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{stated(name, content)}"')
            self.end_headers()
            if self.command == "HEAD":
                return
            hub.asked.append((name, first))
            if name in hub.spoiled:
                content = content[:-1] + bytes([content[-1] ^ 1])
            if name not in hub.breaks:
                self.wfile.write(content[first:])
                return
            self.wfile.write(content[first : hub.breaks.pop(name)])
            self.wfile.flush()
            stop.wait(None if hub.hangs else 0.3)  # what is under way when a connection is reset would be lost
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close by reset
            self.connection.close()
            self.close_connection = True

        def log_message(self, *words):
            pass

    stop = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        stop.set()
        server.shutdown()
        server.server_close()
        thread.join()
