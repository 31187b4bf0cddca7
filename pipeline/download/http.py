"""One HTTP request: repeated while that may help, its redirects followed, its host not crowded, its answer bounded."""

from __future__ import annotations

import fcntl
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

import urllib3
from urllib3.exceptions import (
    HTTPError,
    IncompleteRead,
    LocationValueError,
    MaxRetryError,
    NewConnectionError,
    ProtocolError,
    TimeoutError,
)
from urllib3.util import Retry, Timeout

from pipeline.core.errors import Reject, Transient
from pipeline.download.config import FetchConfig

PIECE = 1 << 16
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
HARMLESS = ("Range", "If-Range", "Accept", "Content-Type")
Response = urllib3.BaseHTTPResponse


def request(
    method: str,
    ask: Callable[[], tuple[str, dict[str, str]]],
    take: Callable[[Response], None],
    cfg: FetchConfig,
    body: bytes | None = None,
    refused: Callable[[int], None] = lambda status: None,
) -> None:
    """Ask, and let `take` read the answer, until it has read one to its end."""
    retry = Retry(
        total=cfg.retries + 1,
        backoff_factor=cfg.backoff_s / 2,  # times 2 to the number of errors so far
        backoff_jitter=cfg.backoff_s,
        backoff_max=cfg.max_wait_s,
        retry_after_max=int(cfg.max_wait_s),
    ).increment(
        method, ""
    )  # urllib3 would send the first repetition at once: an error before the first makes it wait
    while True:
        answer: Response | None = None
        url, headers = ask()
        try:
            with _answer(method, url, headers, cfg, body) as response:
                if response.status in (200, 206):
                    take(response)
                    return
                refused(response.status)
                answer = response
                reason = f"http_{response.status}"
                if not _may_pass(response):
                    raise Reject(reason, host=_host(url))
        except LocationValueError as error:  # also a scheme that is not http
            raise Reject("bad_url", url=url[:200]) from error
        except NewConnectionError:
            reason = "connection_lost"
        except TimeoutError:
            reason = "no_answer"
        except ProtocolError as error:
            short = any(isinstance(part, IncompleteRead) for part in (error, *error.args))
            reason = "truncated" if short else "connection_lost"
        except HTTPError:
            reason = "connection_lost"
        try:
            retry = retry.increment(method, "", response=answer)
        except MaxRetryError:
            raise Transient(reason, host=_host(url)) from None
        retry.sleep(answer)


def post_json(
    url: str, body: Any, headers: Mapping[str, str], cfg: FetchConfig, max_bytes: int = 1 << 20
) -> Any:
    """The JSON that a server answers to JSON. Errors as in `fetch`, and Reject "bad_answer"."""
    content = b""

    def take(response: Response) -> None:
        nonlocal content
        content = b"".join(pieces(response, max_bytes, cfg))

    request("POST", lambda: (url, dict(headers)), take, cfg, body=json.dumps(body).encode())
    try:
        return json.loads(content)
    except ValueError as error:
        raise Reject("bad_answer", host=_host(url)) from error


def _may_pass(response: Response) -> bool:
    """Whether a refusal may end by itself. GitHub says 403 when it has been asked too often."""
    asked_too_often = (
        "Retry-After" in response.headers or response.headers.get("X-RateLimit-Remaining") == "0"
    )
    return response.status in RETRIED or (response.status == 403 and asked_too_often)


@contextmanager
def _answer(
    method: str, url: str, headers: dict[str, str], cfg: FetchConfig, body: bytes | None
) -> Iterator[Response]:
    """The answer after redirects, its headers read, its body not. One of the host's places is held meanwhile."""
    origin = _parts(url)
    for _ in range(cfg.max_redirects + 1):
        with _host_slot(url, cfg):
            response = _pool(cfg).request(
                method,
                url,
                body=body,
                headers={"User-Agent": "sparse3d", "Accept-Encoding": "identity", **headers},
                redirect=False,
                retries=False,
                preload_content=False,
                timeout=Timeout(connect=cfg.connect_timeout_s, read=cfg.read_timeout_s),
            )
            try:
                if response.status not in REDIRECTS or "Location" not in response.headers:
                    yield response
                    return
                location = response.headers["Location"]
            finally:
                response.close()
        there = _parts(location, url)
        url = there.geturl()
        if there.netloc != origin.netloc:  # what one host may know is not for another
            headers = {name: value for name, value in headers.items() if name in HARMLESS}
        if origin.scheme == "https" and there.scheme != "https":
            raise Reject("insecure_redirect", host=_host(url))
    raise Reject("too_many_redirects", redirects=cfg.max_redirects)


def _parts(url: str, base: str = "") -> SplitResult:
    """Scheme, host and so on of an HTTP URL, which may be relative to another."""
    try:
        parts = urlsplit(urljoin(base, url))
    except ValueError as error:
        raise Reject("bad_url", url=url[:200]) from error
    if parts.scheme not in ("http", "https"):
        raise Reject("bad_url", url=url[:200])
    return parts


def pieces(response: Response, max_bytes: int, cfg: FetchConfig) -> Iterator[bytes]:
    """The body, as it comes. An end before Content-Length is an IncompleteRead (ProtocolError)."""
    deadline = time.monotonic() + cfg.attempt_timeout_s
    claimed = response.headers.get("Content-Length", "")
    if claimed.isdecimal() and int(claimed) > max_bytes:
        raise Reject("file_too_large", bytes=int(claimed), max_bytes=max_bytes)
    size = 0
    while piece := response.read1(
        PIECE, decode_content=False
    ):  # what there is: read would wait for all of it
        size += len(piece)
        if size > max_bytes:
            raise Reject("file_too_large", max_bytes=max_bytes)
        if time.monotonic() > deadline:
            raise TimeoutError("too slow")
        yield piece


@cache
def _pool(cfg: FetchConfig) -> urllib3.PoolManager:
    return urllib3.ProxyManager(cfg.proxy) if cfg.proxy else urllib3.PoolManager()


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2][:100]


@contextmanager
def _host_slot(url: str, cfg: FetchConfig) -> Iterator[None]:
    """One of the host's places, shared by all processes of the machine; a process that dies leaves its place."""
    folder = cfg.root / "hosts" / hashlib.sha256(_host(url).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + cfg.attempt_timeout_s
    while True:
        for number in random.sample(range(cfg.per_host), cfg.per_host):
            with (folder / f"{number}.lock").open("wb") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield
                return
        if time.monotonic() > deadline:
            raise Transient("host_busy", host=_host(url))
        time.sleep(random.uniform(0.02, 0.2))
