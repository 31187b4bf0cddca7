"""One HTTP request: retries, redirects, a connection limit per host and a size limit."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
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
)
from urllib3.exceptions import TimeoutError as HTTPTimeoutError
from urllib3.util import Retry, Timeout

from pipeline.core.errors import Reject, Transient
from pipeline.core.files import lock_one_of
from pipeline.download.config import FetchConfig

CHUNK_BYTES = 1 << 16
RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
HEADERS_FOR_OTHER_HOSTS = ("Range", "If-Range", "Accept", "Content-Type")  # no credentials
Response = urllib3.BaseHTTPResponse


def request(
    method: str,
    prepare: Callable[[], tuple[str, dict[str, str]]],
    consume: Callable[[Response], None],
    cfg: FetchConfig,
    body: bytes | None = None,
    on_refusal: Callable[[int], None] = lambda status: None,
) -> None:
    """Send an HTTP request and retry temporary errors until one response is read completely.

    Args:
        method: HTTP method, such as "GET".
        prepare: Returns the URL and the headers. It is called before each attempt, so a retry can
            ask for the missing rest of a file.
        consume: Reads the body of a response with status 200 or 206. It raises
            urllib3.exceptions.ProtocolError if the body is not usable, which is retried.
        cfg: Timeouts and numbers of retries.
        body: Body of the request.
        on_refusal: Called with every other status before the status is judged. It may raise.

    Raises:
        Reject: "bad_url", "too_many_redirects", "insecure_redirect" or "http_<status>" for a status
            that a retry cannot change.
        Transient: "connection_lost", "no_answer", "truncated", "host_busy" or "http_<status>" after
            `cfg.retries` retries.
    """
    retry = Retry(
        total=cfg.retries + 1,
        backoff_factor=cfg.backoff_s / 2,  # urllib3 multiplies it by 2 ** errors
        backoff_jitter=cfg.backoff_s,
        backoff_max=cfg.max_wait_s,
        retry_after_max=int(cfg.max_wait_s),
    )
    # urllib3 does not wait before the first retry. An error that is counted here makes it wait.
    retry = retry.increment(method, "")
    while True:
        refusal: Response | None = None
        url, headers = prepare()
        try:
            with _open_response(method, url, headers, cfg, body) as response:
                if response.status in (200, 206):
                    consume(response)
                    return
                on_refusal(response.status)
                refusal = response
                reason = f"http_{response.status}"
                if not _is_temporary(response):
                    raise Reject(reason, host=_host_of(url))
        except LocationValueError as error:  # also a scheme other than http
            raise Reject("bad_url", url=url[:200]) from error
        except NewConnectionError:
            reason = "connection_lost"
        except HTTPTimeoutError:
            reason = "no_answer"
        except ProtocolError as error:
            short = any(isinstance(part, IncompleteRead) for part in (error, *error.args))
            reason = "truncated" if short else "connection_lost"
        except HTTPError:
            reason = "connection_lost"
        try:
            retry = retry.increment(method, "", response=refusal)
        except MaxRetryError:
            raise Transient(reason, host=_host_of(url)) from None
        retry.sleep(refusal)


def post_json(
    url: str, body: Any, headers: Mapping[str, str], cfg: FetchConfig, max_bytes: int = 1 << 20
) -> Any:
    """Send a value as JSON with POST and return the JSON value of the response.

    Raises:
        Reject: As `request`, "bad_answer" if the response is not JSON, or "file_too_large" if it
            has more than `max_bytes` bytes.
        Transient: As `request`.
    """
    content = b""

    def consume(response: Response) -> None:
        nonlocal content
        content = b"".join(read_chunks(response, max_bytes, cfg))

    request("POST", lambda: (url, dict(headers)), consume, cfg, body=json.dumps(body).encode())
    try:
        return json.loads(content)
    except ValueError as error:
        raise Reject("bad_answer", host=_host_of(url)) from error


def read_chunks(response: Response, max_bytes: int, cfg: FetchConfig) -> Iterator[bytes]:
    """Yield the body of a response as it arrives.

    Raises:
        Reject: "file_too_large" if the body has, or claims to have, more than `max_bytes` bytes.
        urllib3.exceptions.TimeoutError: If the body takes longer than `cfg.attempt_timeout_s`.
        urllib3.exceptions.IncompleteRead: If the body is shorter than Content-Length.
    """
    deadline = time.monotonic() + cfg.attempt_timeout_s
    claimed = response.headers.get("Content-Length", "")
    if claimed.isdecimal() and int(claimed) > max_bytes:
        raise Reject("file_too_large", bytes=int(claimed), max_bytes=max_bytes)
    size = 0
    # read1 returns what has arrived. read would block until a whole chunk is there, and a server
    # that sends single bytes could then pass the deadline.
    while chunk := response.read1(CHUNK_BYTES, decode_content=False):
        size += len(chunk)
        if size > max_bytes:
            raise Reject("file_too_large", max_bytes=max_bytes)
        if time.monotonic() > deadline:
            raise HTTPTimeoutError(f"the response took longer than {cfg.attempt_timeout_s} s")
        yield chunk


@contextmanager
def hold_lock(
    paths: Sequence[Path], timeout_s: float, *, delete: bool = False, **numbers: Any
) -> Iterator[None]:
    """Hold one of several file locks during a download.

    Args:
        paths: The lock files. See `pipeline.core.files.lock_one_of`.
        timeout_s: Seconds to wait for a free lock.
        delete: Delete the lock file at the end.
        **numbers: Values for the error, by name.

    Raises:
        Transient: "host_busy" if other processes hold all locks for `timeout_s` seconds.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_one_of(paths, timeout_s=timeout_s, delete=delete))
        except TimeoutError as error:
            raise Transient("host_busy", **numbers) from error
        yield


def _is_temporary(response: Response) -> bool:
    """Return whether a retry can succeed. GitHub answers 403 to clients that ask too often."""
    rate_limited = (
        "Retry-After" in response.headers or response.headers.get("X-RateLimit-Remaining") == "0"
    )
    return response.status in RETRIED_STATUSES or (response.status == 403 and rate_limited)


@contextmanager
def _open_response(
    method: str, url: str, headers: dict[str, str], cfg: FetchConfig, body: bytes | None
) -> Iterator[Response]:
    """Follow redirects and yield the final response with its body unread.

    One of the connections allowed to the host is occupied meanwhile.
    """
    origin = _split_url(url)
    for _ in range(cfg.max_redirects + 1):
        with _host_slot(url, cfg):
            response = _connection_pool(cfg).request(
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
                if response.status not in REDIRECT_STATUSES or "Location" not in response.headers:
                    yield response
                    return
                location = response.headers["Location"]
            finally:
                response.close()
        target = _split_url(location, url)
        url = target.geturl()
        if target.netloc != origin.netloc:  # credentials stay with the first host
            headers = {
                name: value for name, value in headers.items() if name in HEADERS_FOR_OTHER_HOSTS
            }
        if origin.scheme == "https" and target.scheme != "https":
            raise Reject("insecure_redirect", host=_host_of(url))
    raise Reject("too_many_redirects", redirects=cfg.max_redirects)


def _split_url(url: str, base: str = "") -> SplitResult:
    """Split an HTTP URL, which may be relative to `base`."""
    try:
        parts = urlsplit(urljoin(base, url))
    except ValueError as error:
        raise Reject("bad_url", url=url[:200]) from error
    if parts.scheme not in ("http", "https"):
        raise Reject("bad_url", url=url[:200])
    return parts


@cache
def _connection_pool(cfg: FetchConfig) -> urllib3.PoolManager:
    return urllib3.ProxyManager(cfg.proxy) if cfg.proxy else urllib3.PoolManager()


def _host_of(url: str) -> str:
    """Return host and port of a URL without the user's name and password."""
    return urlsplit(url).netloc.rpartition("@")[2][:100]


@contextmanager
def _host_slot(url: str, cfg: FetchConfig) -> Iterator[None]:
    """Occupy one of the `cfg.per_host` connections that all processes of the machine share."""
    folder = cfg.root / "hosts" / hashlib.sha256(_host_of(url).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    slots = [folder / f"{number}.lock" for number in range(cfg.per_host)]
    with hold_lock(slots, cfg.attempt_timeout_s, host=_host_of(url)):
        yield
