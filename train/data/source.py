"""Where training reads a build from: a directory, or a URL through a local cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from pipeline.core.errors import UserError
from pipeline.storage.cached_path import CachedPath
from pipeline.storage.range_cache import RangeCache
from pipeline.storage.remote import ReadStop, RemotePath, StorePath, check_exists
from train.data.config import CacheConfig

Item = TypeVar("Item")
Result = TypeVar("Result")

CONCURRENT_READS = 64  # from a remote build
OPEN_SHARDS = 512  # shards that a reader keeps open, of some ten kilobytes each


def open_source(path: StorePath, cache: CacheConfig) -> StorePath:
    """Return a path for reading: a local path as it is, or a URL with the cache before it.

    Raises:
        UserError: If there is nothing at the URL, it cannot be read, or the cache cannot be used.
    """
    if isinstance(path, Path):
        return path
    if path.scheme == "memory":
        raise UserError(f"{path} is visible to one process only; choose another --data")
    check_exists(path)
    ranges = RangeCache(cache.dir, cache.max_bytes)
    return CachedPath(path.url, path.retry_waits_s, ReadStop(), cache=ranges)


class ConcurrentReader:
    """Runs reads at the same time if one of the roots is remote, and one after another otherwise.

    A remote read waits for the store most of the time.

    Args:
        *roots: Where the data lies.
    """

    def __init__(self, *roots: StorePath):
        is_remote = any(isinstance(root, RemotePath) for root in roots)
        self._pool = ThreadPoolExecutor(CONCURRENT_READS) if is_remote else None

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Return the results of a function that reads, in the order of the items."""
        return list((self._pool.map if self._pool else map)(function, items))
