"""A read-only S3 server for local files, with a latency and a bandwidth, in a process of its own.

It answers what reading a build needs: ListObjectsV2, HeadObject, and GetObject with Range and
If-Match. Run it as `python -m benchmarks.throttled_store FOLDER`; it writes its port to standard
output. A real store has its latency before the first byte of each answer and its bandwidth for all
answers together, and so has this one. GET /statistics returns what it has sent so far as JSON, at
once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from urllib.request import ProxyHandler, build_opener
from xml.sax.saxutils import escape

from benchmarks.throttled_store_config import StoreConfig
from pipeline.core.cli import command, parse
from pipeline.core.errors import RunError

BUCKET = "bucket"
STATISTICS = "/statistics"
PIECE_BYTES = 256 << 10
MAX_KEYS = 1000
REASONS = {200: "OK", 206: "Partial Content", 404: "Not Found", 412: "Precondition Failed"}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Status, headers and body of an answer. The body is bytes, or a range of a file."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    file: Path | None = None
    start: int = 0
    size: int = 0


@dataclass(frozen=True, kw_only=True)
class StoreStatistics:
    """What a store has done since it was started.

    Args:
        requests: Number of requests.
        bytes: Number of bytes of the answers' bodies.
        most_in_flight: Largest number of requests that were being answered at the same time.
        busy_s: Sum of the durations of all answers in seconds.
    """

    requests: int = 0
    bytes: int = 0
    most_in_flight: int = 0
    busy_s: float = 0.0

    def since(self, before: StoreStatistics) -> StoreStatistics:
        """Return the difference to earlier statistics. `most_in_flight` is kept as it is."""
        return StoreStatistics(
            requests=self.requests - before.requests,
            bytes=self.bytes - before.bytes,
            most_in_flight=self.most_in_flight,
            busy_s=self.busy_s - before.busy_s,
        )


class Bandwidth:
    """Lets answers share a number of bytes per second."""

    def __init__(self, bytes_per_s: float):
        self.bytes_per_s = bytes_per_s
        self._free_at = 0.0

    async def take(self, size: int) -> None:
        """Wait until `size` bytes may be sent."""
        now = time.monotonic()
        self._free_at = max(self._free_at, now) + size / self.bytes_per_s
        await asyncio.sleep(self._free_at - now)


class ThrottledStore:
    """Serves the files below a folder as the objects of one bucket.

    Args:
        cfg: Folder, latency and bandwidth.
    """

    def __init__(self, cfg: StoreConfig):
        self.cfg = cfg
        self.bandwidth = Bandwidth(cfg.megabytes_per_s * 1e6)
        self.statistics = StoreStatistics()
        self._in_flight = 0

    async def serve(self) -> None:
        """Accept connections until the process ends."""
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=512)
        sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
        sys.stdout.flush()
        async with server:
            await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode("latin-1").split("\r\n")
                headers = {
                    name.lower(): value.strip()
                    for name, _, value in (line.partition(":") for line in lines if line)
                }
                method, target, _ = first.split(" ")
                if target == STATISTICS:
                    body = json.dumps(asdict(self.statistics)).encode()
                    await self._send(writer, Answer(status=200, headers={}, body=body), method)
                    continue
                with self._counted():
                    await asyncio.sleep(self.cfg.latency_ms / 1000)
                    await self._send(writer, self.answer(target, headers), method)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has left
        finally:
            writer.close()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count a request."""
        self._in_flight += 1
        began = time.monotonic()
        try:
            yield
        finally:
            self._in_flight -= 1
            counted = self.statistics
            self.statistics = replace(
                counted,
                requests=counted.requests + 1,
                most_in_flight=max(counted.most_in_flight, self._in_flight + 1),
                busy_s=counted.busy_s + time.monotonic() - began,
            )

    def answer(self, target: str, headers: dict[str, str]) -> Answer:
        """Return the answer to a request for a path with a query."""
        parts = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        key = unquote(parts.path).removeprefix(f"/{BUCKET}").strip("/")
        if not key:
            return self._listing(query)
        path = self.cfg.folder / key
        if not path.is_file():
            body = b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>"
            return Answer(status=404, headers={"Content-Type": "application/xml"}, body=body)
        size, etag = path.stat().st_size, etag_of(path)
        found = {"ETag": etag, "Accept-Ranges": "bytes", "Last-Modified": _date(path)}
        if headers.get("if-match", etag) != etag:
            return Answer(status=412, headers=found)
        start, end, status = 0, size, 200
        if "range" in headers:
            first, _, last = headers["range"].removeprefix("bytes=").partition("-")
            start, end, status = int(first), min(int(last) + 1 if last else size, size), 206
            found["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        return Answer(status=status, headers=found, file=path, start=start, size=end - start)

    def _listing(self, query: dict[str, str]) -> Answer:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token", "")
        folder = self.cfg.folder / prefix.rpartition("/")[0]
        contents, prefixes = [], []
        for name in sorted(_names(folder, self.cfg.folder, deep=not delimiter)):
            if not name.startswith(prefix) or name <= after:
                continue
            if len(contents) + len(prefixes) == MAX_KEYS:
                break
            after_name = name
            (prefixes if name.endswith("/") else contents).append(name)
        else:
            after_name = ""
        rows = [_row(self.cfg.folder / name, name) for name in contents]
        rows += [
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in prefixes
        ]
        token = f"<NextContinuationToken>{escape(after_name)}</NextContinuationToken>"
        body = (
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix>"
            f"<KeyCount>{len(rows)}</KeyCount><MaxKeys>{MAX_KEYS}</MaxKeys>"
            f"<IsTruncated>{str(bool(after_name)).lower()}</IsTruncated>"
            f"{token if after_name else ''}{''.join(rows)}</ListBucketResult>"
        )
        return Answer(status=200, headers={"Content-Type": "application/xml"}, body=body.encode())

    async def _send(self, writer: asyncio.StreamWriter, answer: Answer, method: str) -> None:
        size = len(answer.body) or answer.size
        lines = [f"HTTP/1.1 {answer.status} {REASONS[answer.status]}", f"Content-Length: {size}"]
        lines += [f"{name}: {value}" for name, value in answer.headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
        if method == "HEAD":
            await writer.drain()
            return
        if answer.file is None:
            writer.write(answer.body)
            await writer.drain()
            return
        with answer.file.open("rb") as file:
            file.seek(answer.start)
            left = answer.size
            while left:
                piece = file.read(min(left, PIECE_BYTES))
                await self.bandwidth.take(len(piece))
                writer.write(piece)
                await writer.drain()
                left -= len(piece)
                sent = self.statistics.bytes + len(piece)
                self.statistics = replace(self.statistics, bytes=sent)


def statistics_of(endpoint: str) -> StoreStatistics:
    """Ask a running store for its statistics.

    Args:
        endpoint: As `running` yields it.
    """
    opener = build_opener(ProxyHandler({}))  # no proxy stands between the client and the store
    with opener.open(f"{endpoint}{STATISTICS}", timeout=30) as answer:
        return StoreStatistics(**json.loads(answer.read()))


def etag_of(path: Path) -> str:
    """Return the version of a file: a hash of its size and of the time of its last change."""
    status = path.stat()
    return f'"{hashlib.md5(f"{status.st_size}-{status.st_mtime_ns}".encode()).hexdigest()}"'


def _names(folder: Path, root: Path, *, deep: bool) -> Iterator[str]:
    if not folder.is_dir():
        return
    for path in folder.rglob("*") if deep else folder.iterdir():
        name = path.relative_to(root).as_posix()
        if path.is_file():
            yield name
        elif not deep:
            yield f"{name}/"


def _row(path: Path, name: str) -> str:
    date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(path.stat().st_mtime))
    return (
        f"<Contents><Key>{escape(name)}</Key><LastModified>{date}</LastModified>"
        f"<ETag>{escape(etag_of(path))}</ETag><Size>{path.stat().st_size}</Size></Contents>"
    )


def _date(path: Path) -> str:
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(path.stat().st_mtime))


@contextmanager
def running(cfg: StoreConfig) -> Iterator[str]:
    """Run a store in a process of its own. Yields its endpoint, such as "http://127.0.0.1:9000".

    Raises:
        RunError: If the process does not start.
    """
    words = [str(cfg.folder), "--latency-ms", str(cfg.latency_ms)]
    words += ["--megabytes-per-s", str(cfg.megabytes_per_s)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.throttled_store", *words],
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        if not port:
            raise RunError(f"the store could not be started on {cfg.folder}; see its message above")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def main(args: Sequence[str]) -> None:
    """Parse the options and serve."""
    cfg = parse(StoreConfig, args, prog="python -m benchmarks.throttled_store")
    asyncio.run(ThrottledStore(cfg).serve())


if __name__ == "__main__":
    command(main)
