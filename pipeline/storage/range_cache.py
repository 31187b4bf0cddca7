"""A bounded cache of byte ranges in a local directory, shared by the processes of a machine."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import google_crc32c

from pipeline.core.errors import UserError
from pipeline.core.files import is_disk_full

log = logging.getLogger(__name__)

CHECKSUM_BYTES = 4
KEPT_SHARE = 0.9  # of the limit that an eviction leaves, so that evictions are rare
ABANDONED_AFTER_S = 600.0  # age at which an unfinished file is one of a killed process
USAGE = "usage"  # name of the lock file, which holds the number of bytes in use
DOWNLOADS = "downloads"  # name of the directory of lock files, which are empty
RANGES = "[0-9a-f][0-9a-f]/*"  # pattern of the files with ranges


class RangeCache:
    """Keeps byte ranges as files and deletes the least recently used ones beyond a limit.

    Several processes and threads may use one directory. The files together never exceed the limit.
    If several of them miss a range at the same time, one downloads it and the others wait for it.
    A file is written under a temporary name and carries a checksum, so a killed process or a
    damaged disk costs a download and never gives wrong bytes. If the disk is full, ranges are
    downloaded and not kept.

    Args:
        folder: Directory of the cache. It is created.
        max_bytes: Largest number of bytes of all files together.

    Raises:
        UserError: If the directory cannot be written to.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self.folder = folder.absolute()
        self.max_bytes = max_bytes
        self._numbers = itertools.count()
        self._is_full = False
        try:
            (self.folder / DOWNLOADS).mkdir(parents=True, exist_ok=True)
            with self._usage():
                pass
        except OSError as error:
            raise UserError(
                f"the cache cannot use {self.folder}: {error.strerror}; choose another --cache.dir"
            ) from error

    def get(self, key: str, size: int, fetch: Callable[[], bytes]) -> bytes:
        """Return the range that belongs to a key, from the cache or from `fetch`.

        Args:
            key: Names the object, its version and the range.
            size: Number of bytes of the range.
            fetch: Downloads the range. Its errors are passed on and nothing is kept.
        """
        name = hashlib.sha256(key.encode()).hexdigest()
        path = self.folder / name[:2] / name
        data = _read(path, size)
        if data is None:
            with self._downloading(name):
                data = _read(path, size)  # another thread or process may have downloaded it by now
                if data is None:
                    data = fetch()
                    self._keep(path, data)
        return data

    @contextmanager
    def _downloading(self, name: str) -> Iterator[None]:
        """Hold the lock of a range's download, which it shares with 1 of 4096 other ranges.

        A lock ends with its process. If its file cannot be made, nothing is locked.
        """
        try:
            descriptor = os.open(self.folder / DOWNLOADS / name[:3], os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            yield
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _keep(self, path: Path, data: bytes) -> None:
        size = len(data) + CHECKSUM_BYTES
        if size > KEPT_SHARE * self.max_bytes:
            return
        partial = path.with_name(
            f"{path.name}.{os.getpid()}-{threading.get_ident()}-{next(self._numbers)}.partial"
        )
        try:
            path.parent.mkdir(exist_ok=True)
            try:
                self._reserve(partial, size)
                with partial.open("r+b") as file:
                    file.write(data + _checksum(data))
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            if not self._is_full:
                self._is_full = True
                advice = "free some space" if is_disk_full(error) else "check the directory"
                log.warning(
                    "The cache in %s cannot be written (%s). What it lacks is downloaded every "
                    "time; %s.",
                    self.folder,
                    error.strerror,
                    advice,
                )

    def _reserve(self, partial: Path, size: int) -> None:
        """Create a file of the given size within the limit, deleting others if need be."""
        with self._usage() as usage:
            used = int(os.pread(usage, 32, 0) or b"0")
            if used + size > self.max_bytes:
                used = self._evict(int(KEPT_SHARE * self.max_bytes) - size)
            # The file has its size at once, so that every count of the files includes it.
            with partial.open("wb") as file:
                file.truncate(size)
            os.ftruncate(usage, 0)
            os.pwrite(usage, str(used + size).encode(), 0)

    def _evict(self, target: int) -> int:
        """Delete the least recently used files until at most `target` bytes are left."""
        files: list[tuple[float, int, Path]] = []
        used = 0
        for path in self.folder.glob(RANGES):
            try:
                status = path.stat()
            except FileNotFoundError:  # its writer has just renamed it
                continue
            if path.suffix != ".partial":
                files.append((status.st_mtime, status.st_size, path))
            elif time.time() - status.st_mtime > ABANDONED_AFTER_S:
                path.unlink(missing_ok=True)
                continue
            used += status.st_size
        for _, size, path in sorted(files):
            if used <= target:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used

    @contextmanager
    def _usage(self) -> Iterator[int]:
        """Hold the lock of the cache. Yields the descriptor of the file with the bytes in use."""
        descriptor = os.open(self.folder / USAGE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)


def _checksum(data: bytes) -> bytes:
    return google_crc32c.value(data).to_bytes(CHECKSUM_BYTES, "little")


def _read(path: Path, size: int) -> bytes | None:
    """Return the content of a file of the cache, or None if it is missing or damaged."""
    try:
        with path.open("rb") as file:  # two reads are cheaper than cutting the checksum off
            data, checksum = file.read(size), file.read()
        os.utime(path)
    except OSError:
        return None
    return data if len(data) == size and checksum == _checksum(data) else None
