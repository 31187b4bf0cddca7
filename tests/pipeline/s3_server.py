"""An S3 server that others wrote, on loopback, and a wire to it that can be cut at a chosen request."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from moto.server import ThreadedMotoServer

BUCKET = "bucket"
REQUEST = re.compile(rb"(GET|PUT|POST|DELETE|HEAD) (\S+) HTTP/1\.1\r\n")
KEYS = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}


@dataclass
class Cut:
    """Resets connections on which a request comes whose "METHOD /path?query" `pattern` matches.

    "body": so many bytes after the request began to pass, which is before its end is sent on. "answer": once the
    server has answered, of which nothing passes: it has done what was asked, and nobody knows.
    """

    pattern: str
    where: str  # body | answer
    times: int = 1
    after_bytes: int = 0
    done: list[str] = field(default_factory=list)  # the requests that were cut


class Wire:
    """A TCP proxy. Without cuts it is not noticed."""

    def __init__(self, server: tuple[str, int]):
        self.server, self.cuts, self.down = server, list[Cut](), False
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
            for pump in (self._requests, self._answers):
                threading.Thread(target=pump, args=(*pair, state), daemon=True).start()

    def _requests(
        self, client: socket.socket, server: socket.socket, state: dict[str, Any]
    ) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                found = REQUEST.search(data)
                if found:
                    line = b" ".join(found.groups()).decode()
                    state |= {"cut": self._claim(line), "line": line, "passed": 0}
                cut = state["cut"]
                if self.down:
                    break
                if cut is not None and cut.where == "body":
                    left = cut.after_bytes - state["passed"]
                    if len(data) > left:
                        server.sendall(data[:left])
                        break
                    state["passed"] += len(data)
                server.sendall(data)
        self._end(client, server, state)

    def _answers(self, client: socket.socket, server: socket.socket, state: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                cut = state["cut"]
                if self.down or (
                    cut is not None
                    and cut.where == "answer"
                    and not data.startswith(b"HTTP/1.1 100")
                ):
                    break
                client.sendall(data)
        self._end(client, server, state)

    def _claim(self, line: str) -> Cut | None:
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
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
        connection.close()


class Store:
    """What lies in the server, looked at past the wire and past our own code."""

    def __init__(self, server: tuple[str, int], wire: Wire):
        self.wire = wire
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
        """Of the wire."""
        return f"http://127.0.0.1:{self.wire.port}"

    def environment(self) -> dict[str, str]:
        """By which a process of its own finds the store."""
        nothing = {name: "/dev/null" for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")}
        keys = {name.upper(): value for name, value in KEYS.items()}
        return {**keys, **nothing, "AWS_ENDPOINT_URL": self.endpoint, "AWS_REGION": "us-east-1"}

    def write_settings(self, home: Path) -> None:
        """By which the processes that have this HOME find the store."""
        folder = home / ".aws"
        folder.mkdir(exist_ok=True)
        (folder / "config").write_text(
            f"[default]\nregion = us-east-1\nendpoint_url = {self.endpoint}\n"
        )
        (folder / "credentials").write_text(
            "\n".join(["[default]", *(f"{k} = {v}" for k, v in KEYS.items())])
        )

    def keys(self, prefix: str) -> list[str]:
        """Below a prefix, relative to it."""
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

    def download(self, prefix: str, folder: Path) -> Path:
        """Everything below a prefix as files."""
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
    """A store with an empty bucket."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for every request
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    wire = Wire(server.get_host_and_port())
    try:
        yield Store(server.get_host_and_port(), wire)
    finally:
        wire.close()
        server.stop()
