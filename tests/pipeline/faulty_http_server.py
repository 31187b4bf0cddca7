"""An HTTP server on loopback with scripted faults: one behaviour per path and visit."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PAGE = b"<!DOCTYPE html><html><body>Please wait ...</body></html>"


class Handler(BaseHTTPRequestHandler):
    """Sends `files[path]` with the fault that `scripts[path]` names for this visit.

    After the end of a script files are sent correctly. A script that ends in "always" repeats the
    behaviour before it.
    """

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            visit = server.visit_counts.get(self.path, 0)
            server.visit_counts[self.path] = visit + 1
            server.requests.append((self.path, dict(self.headers)))
            server.open_now += 1
            server.max_open = max(server.max_open, server.open_now)
        script = server.scripts.get(self.path, [])
        if visit < len(script) and script[visit] != "always":
            behaviour = script[visit]
        else:
            behaviour = script[-2] if script and script[-1] == "always" else "serve"
        name, _, argument = behaviour.partition(" ")
        try:
            getattr(self, name)(argument)
        finally:
            with server.lock:
                server.open_now -= 1

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = json.dumps(self.server.post_handlers[self.path](body)).encode()
        self._head(200, {"Content-Length": len(answer)})
        self.wfile.write(answer)

    def serve(self, _: str = "") -> None:
        """Send the file, or the requested range of it, correctly."""
        content = self.server.files.get(self.path)
        if content is None:
            self.status("404")
            return
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        wanted = self.headers.get("Range")
        if wanted and self.headers.get("If-Range", tag) == tag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.status("416")
                return
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._head(
                206, {"Content-Length": len(content) - start, "Content-Range": span, "ETag": tag}
            )
            self.wfile.write(content[start:])
            return
        self._head(200, {"Content-Length": len(content), "ETag": tag})
        self.wfile.write(content)

    def slowly(self, seconds: str) -> None:
        """Wait, then send the file correctly."""
        time.sleep(float(seconds))
        self.serve()

    def status(self, words: str) -> None:
        """Answer with a status code and, if it is given, a Retry-After header."""
        code, _, after = words.partition(" ")
        headers = {"Content-Length": len(PAGE)} | ({"Retry-After": after} if after else {})
        self._head(int(code), headers)
        self.wfile.write(PAGE)

    def reset(self, sent: str) -> None:
        """Reset the TCP connection after some bytes of the body, or before the header."""
        if sent:
            content = self.server.files[self.path]
            tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            self._head(200, {"Content-Length": len(content), "ETag": tag})
            self.wfile.write(content[: int(sent)])
            self.wfile.flush()
            time.sleep(0.05)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def truncate(self, sent: str) -> None:
        """Close the connection after some bytes of the body."""
        content = self.server.files[self.path]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        headers = {"Content-Length": len(content) - start, "ETag": '"same"'}
        span = (
            {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        )
        self._head(206 if start else 200, headers | span)
        self.wfile.write(content[start : start + int(sent)])
        self.close_connection = True

    def ignore_range(self, _: str) -> None:
        """Send the whole file although a range was requested."""
        content = self.server.files[self.path]
        self._head(200, {"Content-Length": len(content), "ETag": '"another"'})
        self.wfile.write(content)

    def wrong_range(self, _: str) -> None:
        """Send another range than the requested one."""
        content = self.server.files[self.path]
        span = f"bytes 1-{len(content) - 1}/{len(content)}"
        self._head(206, {"Content-Length": len(content) - 1, "Content-Range": span})
        self.wfile.write(content[1:])

    def stall(self, seconds: str) -> None:
        """Send ten bytes and then nothing for some seconds."""
        content = self.server.files[self.path]
        self._head(200, {"Content-Length": len(content)})
        self.wfile.write(content[:10])
        self.wfile.flush()
        self.server.end.wait(float(seconds))
        self.close_connection = True

    def drip(self, _: str) -> None:
        """Send single bytes without end, so that no read times out."""
        self._head(200, {"Content-Length": 1 << 20})
        while not self.server.end.wait(0.05):
            self.wfile.write(b"x")
            self.wfile.flush()

    def html(self, _: str) -> None:
        """Send a web page with status 200."""
        self._head(200, {"Content-Length": len(PAGE)})
        self.wfile.write(PAGE)

    def endless(self, _: str) -> None:
        """Send bytes without end and without Content-Length."""
        self._head(200, {"Connection": "close"})
        self.close_connection = True
        while not self.server.end.is_set():
            self.wfile.write(b"x" * 65536)

    def redirect(self, location: str) -> None:
        """Redirect to another URL."""
        self._head(302, {"Location": location, "Content-Length": 0})

    def _head(self, code: int, headers: dict[str, object]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def handle(self) -> None:
        try:
            super().handle()
        except (
            ConnectionError,
            ValueError,
            OSError,
        ):  # a scripted fault, or the client closed the connection
            self.close_connection = True

    def finish(self) -> None:
        with suppress(ConnectionError, ValueError, OSError):
            super().finish()

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Holds the files and scripts, and records requests and the number of open connections."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.scripts: dict[str, list[str]] = {}
        self.post_handlers: dict[str, Callable[[dict], object]] = {}
        self.visit_counts: dict[str, int] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.lock = threading.Lock()
        self.end = threading.Event()
        self.open_now = self.max_open = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *args: object) -> None:
        pass


@contextmanager
def run_server():
    """Run a server in a thread until the block ends."""
    server = Server()
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    )
    thread.start()
    try:
        yield server
    finally:
        server.end.set()
        server.shutdown()
        server.server_close()
        thread.join()
