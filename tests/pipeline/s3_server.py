"""Moto's S3 server on the loopback device, behind a proxy that can cut connections."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from moto.server import ThreadedMotoServer

BUCKET = "bucket"
REQUEST = re.compile(rb"(GET|PUT|POST|DELETE|HEAD) (\S+) HTTP/1\.1\r\n")
ERROR = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
SLOW_DOWN = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(ERROR), ERROR)
)
KEYS = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}


@dataclass
class Cut:
    """A request to reset connections.

    Attributes:
        pattern: Regular expression for the "METHOD /path?query" of the requests to cut.
        where: "body" cuts within the request, so that the server does not receive its end.
            "answer" cuts within the answer. The server has then done what was asked, but the
            client does not learn of it. "stall" keeps the connection open and passes no answer on.
            "throttle" answers that the client must slow down, and the server gets nothing.
        times: Number of requests to cut.
        after_bytes: Number of bytes of the request or the answer that pass before the cut.
        done: The requests that were cut.
    """

    pattern: str
    where: str
    times: int = 1
    after_bytes: int = 0
    done: list[str] = field(default_factory=list)


class CuttingProxy:
    """A TCP proxy in front of the server. It passes everything on unless `cuts` or `down` are set.

    Attributes:
        cuts: The requests to cut.
        down: Whether every connection is refused.
        latency_s: Seconds before each answer is passed on.
    """

    def __init__(self, server: tuple[str, int]):
        self.server = server
        self.cuts: list[Cut] = []
        self.down = False
        self.latency_s = 0.0
        self.lock = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            if self.down:
                _reset(client)
                continue
            pair = (client, socket.create_connection(self.server))
            for connection in pair:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            state: dict[str, Any] = {"cut": None, "passed": 0}
            for forward in (self._forward_requests, self._forward_answers):
                threading.Thread(target=forward, args=(*pair, state), daemon=True).start()

    def _forward_requests(
        self, client: socket.socket, server: socket.socket, state: dict[str, Any]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                match = REQUEST.search(data)
                if match:
                    line = b" ".join(match.groups()).decode()
                    state |= {"cut": self._take_cut(line), "line": line, "passed": 0}
                cut = state["cut"]
                if self.down:
                    break
                if cut is not None and cut.where == "throttle":
                    client.sendall(SLOW_DOWN)
                    state["cut"] = None
                    continue
                if cut is not None and cut.where == "body":
                    allowed = cut.after_bytes - state["passed"]
                    if len(data) > allowed:
                        server.sendall(data[:allowed])
                        break
                    state["passed"] += len(data)
                server.sendall(data)
        self._end(client, server, state)

    def _forward_answers(
        self, client: socket.socket, server: socket.socket, state: dict[str, Any]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                cut = state["cut"]
                if data.startswith(b"HTTP/1.1 "):
                    time.sleep(self.latency_s)
                if self.down:
                    break
                if cut is not None and not data.startswith(b"HTTP/1.1 100"):
                    if cut.where == "stall":
                        continue
                    if cut.where == "answer":
                        client.sendall(data[: cut.after_bytes])
                        break
                client.sendall(data)
        self._end(client, server, state)

    def _take_cut(self, line: str) -> Cut | None:
        """Return the cut that applies to a request, and count it."""
        with self.lock:
            for cut in self.cuts:
                if len(cut.done) < cut.times and re.search(cut.pattern, line):
                    cut.done.append(line)
                    return cut
        return None

    def _end(self, client: socket.socket, server: socket.socket, state: dict[str, Any]) -> None:
        for connection in (client, server):
            if state["cut"] is not None or self.down:
                _reset(connection)
            else:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


def _reset(connection: socket.socket) -> None:
    """Close a connection so that the other end sees a reset."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
        connection.close()


class Store:
    """The contents of the server, read without the proxy and without the code under test."""

    def __init__(self, server: tuple[str, int], proxy: CuttingProxy):
        self.proxy = proxy
        self.client = boto3.client(
            "s3",
            endpoint_url=f"http://{server[0]}:{server[1]}",
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}),
            **KEYS,
        )
        self.client.create_bucket(Bucket=BUCKET)

    @property
    def endpoint(self) -> str:
        """URL of the proxy."""
        return f"http://127.0.0.1:{self.proxy.port}"

    def environment(self) -> dict[str, str]:
        """Return the variables by which another process finds the store."""
        nothing = {name: "/dev/null" for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")}
        keys = {name.upper(): value for name, value in KEYS.items()}
        return {**keys, **nothing, "AWS_ENDPOINT_URL": self.endpoint, "AWS_REGION": "us-east-1"}

    def write_settings(self, home: Path) -> None:
        """Write the files by which processes with this HOME find the store."""
        folder = home / ".aws"
        folder.mkdir(exist_ok=True)
        (folder / "config").write_text(
            f"[default]\nregion = us-east-1\nendpoint_url = {self.endpoint}\n", encoding="utf-8"
        )
        (folder / "credentials").write_text(
            "\n".join(["[default]", *(f"{k} = {v}" for k, v in KEYS.items())]), encoding="utf-8"
        )

    def keys(self, prefix: str) -> list[str]:
        """List the keys below a prefix, relative to it."""
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=BUCKET, Prefix=f"{prefix}/"
        )
        return [
            item["Key"][len(prefix) + 1 :] for page in pages for item in page.get("Contents", [])
        ]

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def upload(self, folder: Path, prefix: str) -> str:
        """Upload all files of a directory below a prefix. Return the URL of the prefix."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def download(self, prefix: str, folder: Path) -> Path:
        """Download everything below a prefix as files. Return `folder`."""
        for name in self.keys(prefix):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(self.get(f"{prefix}/{name}"))
        return folder

    def unfinished_uploads(self) -> list[str]:
        return [
            upload["Key"]
            for upload in self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
        ]


@contextlib.contextmanager
def running() -> Iterator[Store]:
    """Run a server with an empty bucket."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # it logs a line for every request
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = CuttingProxy(server.get_host_and_port())
    try:
        yield Store(server.get_host_and_port(), proxy)
    finally:
        proxy.close()
        server.stop()
