"""Brings what lies at a URL into a local file: resumed, bounded, checked, never returned if it is something else."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from urllib3.exceptions import ProtocolError

from pipeline.core.errors import Reject, RunError, Transient
from pipeline.core.files import is_disk_full
from pipeline.core.hashing import sha256_of
from pipeline.download.config import FetchConfig
from pipeline.download.http import Response, pieces, request
from pipeline.mesh_io.file_checks import HEAD, check_magic

LFS_HEAD = b"version https://git-lfs"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A file as its catalogue describes it."""

    url: str
    format: str = ""  # extension whose magic bytes it must have; "" = anything but an LFS pointer
    sha256: str | None = None
    max_bytes: int = 1 << 30
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Its name in the cache: that of its bytes where they are known, whatever address they come from today."""
        return hashlib.sha256((self.sha256 or self.url).encode()).hexdigest()[:40]

    @property
    def address(self) -> str:
        """What a note on how asking for it ended goes by."""
        return hashlib.sha256(f"{self.url}\0{self.sha256 or ''}".encode()).hexdigest()[:40]


class LfsPointer(Reject):
    """Instead of a file, git LFS's note on where it is."""

    def __init__(self, oid: str, size: int):
        super().__init__("lfs_pointer", oid=oid, bytes=size)
        self.oid, self.size = oid, size


def fetch(want: Wanted, target: Path, cfg: FetchConfig) -> Path:
    """The file, written to `target` at once and whole; its folder must exist.

    Reject, remembered for a while, where asking again is of no use: "http_<status>", "bad_url", "too_many_redirects",
    "insecure_redirect", "wrong_sha256" (the bytes go to quarantine), "wrong_magic", "empty_file". Not remembered:
    "file_too_large". LfsPointer for git LFS. Transient after cfg.retries where it may be: "connection_lost",
    "no_answer", "truncated", "http_<status>", "host_busy". RunError if the cache cannot be used.
    """
    with _usable(cfg):
        kept = cfg.root / "files" / want.key[:2] / want.key
        if kept.exists() and (want.sha256 is None or sha256_of(kept) == want.sha256):
            return _deliver(kept, target, keep=True)
        with remembered(want.address, cfg), _own_partial(want, cfg) as partial:
            begun = partial.exists()
            _download(want, partial, cfg)
            if begun and want.sha256 is not None and sha256_of(partial) != want.sha256:
                _forget(partial)  # the beginning may be of a machine that went down while it wrote
                _download(want, partial, cfg)
            _check(want, partial, cfg)
            if not cfg.keep:
                return _deliver(partial, target, keep=False)
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial.replace(kept)
        return _deliver(kept, target, keep=True)


@contextmanager
def remembered(key: str, cfg: FetchConfig) -> Iterator[None]:
    """Inside, a final Reject is noted under `key`; until the note expires, the same Reject comes at once.

    An LfsPointer is no verdict on the file, what is Transient may be otherwise next time, and "file_too_large" depends
    on the limit of whoever asks. RunError as `fetch`.
    """
    with _usable(cfg), _remembered(key, cfg):
        yield


@contextmanager
def _remembered(key: str, cfg: FetchConfig) -> Iterator[None]:
    note = cfg.root / "gone" / key[:2] / f"{key}.json"
    if note.exists() and time.time() - note.stat().st_mtime < cfg.negative_ttl_h * 3600:
        with suppress(ValueError, LookupError, OSError):  # a broken note says nothing
            known = json.loads(note.read_text())
            raise Reject(known["reason"], **known["numbers"])
    try:
        yield
    except (Transient, LfsPointer):
        raise
    except Reject as verdict:
        if verdict.reason == "file_too_large":
            raise
        note.parent.mkdir(parents=True, exist_ok=True)
        write_whole(
            note, json.dumps({"reason": verdict.reason, "numbers": verdict.numbers}).encode()
        )
        raise


@contextmanager
def _usable(cfg: FetchConfig) -> Iterator[None]:
    """RunError for what goes wrong in the cache: it would for every asset, and says nothing about this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None or is_disk_full(error):
            raise
        place = Path(error.filename)
        if not place.is_relative_to(cfg.root) and not cfg.root.is_relative_to(place):
            raise
        raise RunError(
            f"cannot use --fetch.cache {cfg.root}: {error.strerror}; choose another"
        ) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file of which nobody ever sees a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)


@contextmanager
def _own_partial(want: Wanted, cfg: FetchConfig) -> Iterator[Path]:
    """The file that a download grows in, this process's alone; it stays for the next attempt if that can go on."""
    folder = cfg.root / "partial" / want.key[:2]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / want.key
    with _locked(path.with_suffix(".lock"), cfg.attempt_timeout_s):
        try:
            yield path
        except Reject as verdict:
            if not isinstance(verdict, Transient):
                _forget(path)
            raise
        _forget(path)


def _forget(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    _state(partial).unlink(missing_ok=True)


def _state(partial: Path) -> Path:
    return partial.with_suffix(".json")


def _download(want: Wanted, partial: Path, cfg: FetchConfig) -> None:
    """Until the partial file is whole. What is there already is not asked for again, if the server can do that."""

    def ask() -> tuple[str, dict[str, str]]:
        headers = dict(want.headers)
        if partial.exists() and partial.stat().st_size:
            validator = ""
            with suppress(ValueError, LookupError, OSError):  # a broken note says nothing
                validator = json.loads(_state(partial).read_text())["validator"]
            if validator:
                headers |= {"If-Range": validator}
            if validator or want.sha256:  # else the rest could be of another file
                headers |= {"Range": f"bytes={partial.stat().st_size}-"}
        return want.url, headers

    def take(response: Response) -> None:
        start = partial.stat().st_size if partial.exists() else 0
        first, last, total = _range(response)
        if response.status == 206 and first != start:
            _forget(partial)
            raise ProtocolError("an answer with another range than was asked for")
        etag = response.headers.get("ETag", "")
        validator = (
            etag
            if etag and not etag.startswith("W/")
            else response.headers.get("Last-Modified", "")
        )
        if response.status == 200 or validator:
            _state(partial).write_text(json.dumps({"validator": validator}))
        goes_on = response.status == 206
        with partial.open("ab" if goes_on else "wb") as file:
            for piece in pieces(response, want.max_bytes - start * goes_on, cfg):
                file.write(piece)
        if goes_on and last + 1 < total:
            raise ProtocolError("less than the rest")

    def refused(status: int) -> None:
        if status == 416:  # what is there does not fit what the server has
            _forget(partial)
            raise ProtocolError("the rest of another file")

    request("GET", ask, take, cfg, refused=refused)


def _range(response: Response) -> tuple[int, int, int]:
    """First byte, last byte and size of the whole, of a 206; -1 for what the server does not say."""
    found = re.fullmatch(
        r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", "").strip()
    )
    if found is None:
        return -1, -1, -1
    return int(found[1]), int(found[2]), -1 if found[3] == "*" else int(found[3])


def _check(want: Wanted, path: Path, cfg: FetchConfig) -> None:
    """Is what arrived what was wanted? Files with another hash are kept in quarantine, for whoever looks into it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEAD)
    pointer = read_pointer(head)
    if pointer is not None:
        raise pointer
    if size == 0:
        raise Reject("empty_file")
    found = sha256_of(path) if want.sha256 is not None else None
    if found != want.sha256:
        folder = cfg.root / "quarantine"
        folder.mkdir(exist_ok=True)
        path.replace(folder / f"{want.key}-{str(found)[:12]}")
        note = {"url": want.url, "expected": want.sha256, "sha256": found}
        write_whole(folder / f"{want.key}.json", json.dumps(note).encode())
        raise Reject("wrong_sha256", expected=want.sha256, sha256=found)
    check_magic(head, want.format, size)


def read_pointer(head: bytes) -> LfsPointer | None:
    """The git LFS pointer that a file's first bytes are, if they are one."""
    if not head.startswith(LFS_HEAD):
        return None
    lines = {
        line.partition(" ")[0]: line.partition(" ")[2]
        for line in head.decode("utf-8", "replace").splitlines()
    }
    kind, _, oid = lines.get("oid", "").partition(":")
    size = lines.get("size", "")
    if (
        kind != "sha256"
        or len(oid) != 64
        or not set(oid) <= set("0123456789abcdef")
        or not size.isdecimal()
    ):
        raise Reject("lfs_pointer", error="not one that can be read")
    return LfsPointer(oid, int(size))


@contextmanager
def _locked(path: Path, timeout_s: float) -> Iterator[None]:
    """A lock that is a file as long as somebody has it. Transient "host_busy" if another process keeps it."""
    deadline = time.monotonic() + timeout_s
    while True:
        with path.open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if (
                    path.exists() and path.stat().st_ino == os.fstat(lock.fileno()).st_ino
                ):  # not removed meanwhile
                    try:
                        yield
                    finally:
                        path.unlink()
                    return
            except BlockingIOError:
                pass
        if time.monotonic() > deadline:
            raise Transient("host_busy")
        time.sleep(random.uniform(0.02, 0.1))


def _deliver(path: Path, target: Path, *, keep: bool) -> Path:
    """Moves or copies a whole file to `target`, which appears at once."""
    partial = target.with_name(f".fetched-{os.getpid()}.partial")
    try:
        (os.link if keep else os.rename)(path, partial)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
            raise
        shutil.copyfile(path, partial)
        if not keep:
            path.unlink()
    partial.replace(target)
    partial.unlink(missing_ok=True)  # it stays if the target was the same file already
    return target
