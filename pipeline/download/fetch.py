"""Download a URL to a local file: resumable, limited in size, and checked before it is used."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from urllib3.exceptions import ProtocolError

from pipeline.core.errors import Reject, RunError, Transient
from pipeline.core.files import is_disk_full, replacing, write_atomically
from pipeline.core.hashing import sha256_of
from pipeline.download.config import FetchConfig
from pipeline.download.http import Response, hold_lock, read_chunks, request
from pipeline.mesh_io.file_checks import HEAD_BYTES, LFS_SIGNATURE, check_magic


@dataclass(frozen=True, kw_only=True)
class DownloadRequest:
    """A file to download, as its catalogue describes it.

    Args:
        url: HTTP or HTTPS URL.
        format: File extension without the dot. The file must begin with the magic bytes of this
            format. "" accepts any content except a git LFS pointer.
        sha256: Expected sha256 of the content as 64 hex digits. None accepts any content.
        max_bytes: Largest accepted size.
        headers: HTTP headers, such as Authorization.
    """

    url: str
    format: str = ""
    sha256: str | None = None
    max_bytes: int = 1 << 30
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def cache_key(self) -> str:
        """Name of the content in the cache. It depends on the sha256 where that is known."""
        return hashlib.sha256((self.sha256 or self.url).encode()).hexdigest()[:40]

    @property
    def negative_cache_key(self) -> str:
        """Key of the negative-cache entry. It depends on the URL and on the sha256."""
        return hashlib.sha256(f"{self.url}\0{self.sha256 or ''}".encode()).hexdigest()[:40]


class LfsPointer(Reject):
    """The server sent a git LFS pointer instead of the file itself.

    Args:
        oid: The sha256 of the real file as 64 hex digits.
        size: Size of the real file in bytes.
    """

    def __init__(self, oid: str, size: int):
        super().__init__("lfs_pointer", oid=oid, bytes=size)
        self.oid, self.size = oid, size


def download(wanted: DownloadRequest, target: Path, cfg: FetchConfig) -> Path:
    """Download a file, or take it from the cache, and write it to `target` atomically.

    An interrupted download is resumed by the next call, also in another process.

    Args:
        wanted: The file to download.
        target: Path of the result.
        cfg: Cache, timeouts and numbers of retries.

    Returns:
        `target`.

    Raises:
        Reject: "http_<status>", "bad_url", "too_many_redirects", "insecure_redirect",
            "wrong_sha256" (the content is moved to the cache's quarantine), "wrong_magic" or
            "empty_file". These are recorded in the negative cache. "file_too_large" is not.
        LfsPointer: If the content is a git LFS pointer.
        Transient: "connection_lost", "no_answer", "truncated", "host_busy" or "http_<status>" after
            `cfg.retries` retries.
        RunError: If the cache cannot be read or written.
    """
    with _cache_errors(cfg):
        kept = cfg.root / "files" / wanted.cache_key[:2] / wanted.cache_key
        if kept.exists() and (wanted.sha256 is None or sha256_of(kept) == wanted.sha256):
            return _deliver(kept, target, keep=True)
        with (
            negative_cache(wanted.negative_cache_key, cfg),
            _locked_partial(wanted, cfg) as partial,
        ):
            resumed = partial.exists()
            _complete(wanted, partial, cfg)
            if resumed and wanted.sha256 is not None and sha256_of(partial) != wanted.sha256:
                # The beginning may be damaged, for example by a power cut. Start from zero once.
                _delete_partial(partial)
                _complete(wanted, partial, cfg)
            _check(wanted, partial, cfg)
            if not cfg.keep:
                return _deliver(partial, target, keep=False)
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial.replace(kept)
        return _deliver(kept, target, keep=True)


@contextmanager
def negative_cache(key: str, cfg: FetchConfig) -> Iterator[None]:
    """Record a rejection that the block raises, and raise it again instead of running the block.

    An entry is valid for `cfg.negative_ttl_h` hours. Three kinds of errors are not recorded:
    `LfsPointer` and `Transient`, which are no verdict on the file, and "file_too_large", which
    depends on the limit of the caller.

    Args:
        key: Key of the entry, at least two hex digits.
        cfg: The cache directory and the lifetime of an entry.

    Raises:
        Reject: The recorded rejection, or the one that the block raises.
        RunError: If the cache cannot be read or written.
    """
    with _cache_errors(cfg), _negative_cache(key, cfg):
        yield


@contextmanager
def _negative_cache(key: str, cfg: FetchConfig) -> Iterator[None]:
    entry = cfg.root / "gone" / key[:2] / f"{key}.json"
    if entry.exists() and time.time() - entry.stat().st_mtime < cfg.negative_ttl_h * 3600:
        with suppress(ValueError, LookupError, OSError):  # a damaged entry is ignored
            recorded = json.loads(entry.read_text(encoding="utf-8"))
            raise Reject(recorded["reason"], **recorded["numbers"])
    try:
        yield
    except (Transient, LfsPointer):
        raise
    except Reject as verdict:
        if verdict.reason == "file_too_large":
            raise
        content = json.dumps({"reason": verdict.reason, "numbers": verdict.numbers})
        write_atomically(entry, content, several_writers=True)
        raise


@contextmanager
def _cache_errors(cfg: FetchConfig) -> Iterator[None]:
    """Turn an error of the cache directory into a RunError: it concerns every asset alike."""
    try:
        yield
    except OSError as error:
        if error.filename is None or is_disk_full(error):
            raise
        path = Path(error.filename)
        if not path.is_relative_to(cfg.root) and not cfg.root.is_relative_to(path):
            raise
        raise RunError(
            f"cannot use --fetch.cache {cfg.root}: {error.strerror}; choose another"
        ) from error


@contextmanager
def _locked_partial(wanted: DownloadRequest, cfg: FetchConfig) -> Iterator[Path]:
    """Yield the file that collects the content, locked against other processes.

    It is kept after temporary errors, so that the next attempt can resume the download.
    """
    folder = cfg.root / "partial" / wanted.cache_key[:2]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / wanted.cache_key
    with hold_lock([path.with_suffix(".lock")], cfg.attempt_timeout_s, delete=True):
        try:
            yield path
        except Reject as verdict:
            if not isinstance(verdict, Transient):
                _delete_partial(path)
            raise
        _delete_partial(path)


def _delete_partial(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _state_file(partial).unlink(missing_ok=True)


def _state_file(partial: Path) -> Path:
    """Return the file that stores the validator (ETag or date) of an unfinished download."""
    return partial.with_suffix(".json")


def _complete(wanted: DownloadRequest, partial: Path, cfg: FetchConfig) -> None:
    """Download until the partial file is complete. Bytes that exist are not requested again."""

    def prepare() -> tuple[str, dict[str, str]]:
        headers = dict(wanted.headers)
        if partial.exists() and partial.stat().st_size:
            validator = ""
            with suppress(ValueError, LookupError, OSError):  # a damaged state file is ignored
                validator = json.loads(_state_file(partial).read_text(encoding="utf-8"))[
                    "validator"
                ]
            if validator:
                headers |= {"If-Range": validator}
            # Without a validator or a hash the rest could belong to another version of the file.
            if validator or wanted.sha256:
                headers |= {"Range": f"bytes={partial.stat().st_size}-"}
        return wanted.url, headers

    def consume(response: Response) -> None:
        start = partial.stat().st_size if partial.exists() else 0
        first, last, total = _content_range(response)
        if response.status == 206 and first != start:
            _delete_partial(partial)
            raise ProtocolError("the server sent another range than the requested one")
        validator = response.headers.get("ETag", "")
        if not validator or validator.startswith("W/"):  # a weak ETag does not identify bytes
            validator = response.headers.get("Last-Modified", "")
        if response.status == 200 or validator:
            _state_file(partial).write_text(json.dumps({"validator": validator}), encoding="utf-8")
        resumes = response.status == 206
        with partial.open("ab" if resumes else "wb") as file:
            for chunk in read_chunks(response, wanted.max_bytes - start * resumes, cfg):
                file.write(chunk)
        if resumes and last + 1 < total:
            raise ProtocolError("the server sent less than the rest of the file")

    def on_refusal(status: int) -> None:
        if status == 416:  # range not satisfiable: the partial file belongs to another version
            _delete_partial(partial)
            raise ProtocolError("the server does not have the requested range")

    request("GET", prepare, consume, cfg, on_refusal=on_refusal)


def _content_range(response: Response) -> tuple[int, int, int]:
    """Return first byte, last byte and total size of a Content-Range header, -1 where unknown."""
    header = response.headers.get("Content-Range", "").strip()
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", header)
    if match is None:
        return -1, -1, -1
    return int(match[1]), int(match[2]), -1 if match[3] == "*" else int(match[3])


def _check(wanted: DownloadRequest, path: Path, cfg: FetchConfig) -> None:
    """Reject content that is not the requested file. A wrong hash moves it to the quarantine."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    pointer = read_pointer(head)
    if pointer is not None:
        raise pointer
    if size == 0:
        raise Reject("empty_file")
    sha256 = sha256_of(path) if wanted.sha256 is not None else None
    if sha256 != wanted.sha256:
        folder = cfg.root / "quarantine"
        folder.mkdir(exist_ok=True)
        path.replace(folder / f"{wanted.cache_key}-{str(sha256)[:12]}")
        details = {"url": wanted.url, "expected": wanted.sha256, "sha256": sha256}
        write_atomically(
            folder / f"{wanted.cache_key}.json", json.dumps(details), several_writers=True
        )
        raise Reject("wrong_sha256", expected=wanted.sha256, sha256=sha256)
    check_magic(head, wanted.format, size)


def read_pointer(head: bytes) -> LfsPointer | None:
    """Parse the first bytes of a file as a git LFS pointer.

    Returns:
        The pointer, or None if the bytes are not one.

    Raises:
        Reject: "lfs_pointer" if the pointer is malformed.
    """
    if not head.startswith(LFS_SIGNATURE):
        return None
    lines = {
        line.partition(" ")[0]: line.partition(" ")[2]
        for line in head.decode("utf-8", "replace").splitlines()
    }
    kind, _, oid = lines.get("oid", "").partition(":")
    size = lines.get("size", "")
    is_hash = kind == "sha256" and len(oid) == 64 and set(oid) <= set("0123456789abcdef")
    if not is_hash or not size.isdecimal():
        raise Reject("lfs_pointer", error="malformed")
    return LfsPointer(oid, int(size))


def _deliver(path: Path, target: Path, *, keep: bool) -> Path:
    """Move a complete file to `target`, or link it if the original is kept. Copy as last resort."""
    with replacing(target, several_writers=True) as partial:
        try:
            (os.link if keep else os.rename)(path, partial)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
                raise
            shutil.copyfile(path, partial)
            if not keep:
                path.unlink()
    return target
