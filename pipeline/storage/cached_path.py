"""Paths of remote builds whose ranges are kept in a local cache."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ClassVar

from pipeline.storage.range_cache import RangeCache
from pipeline.storage.remote import RemoteObject, RemotePath

CONCURRENT_READS = 32
UNIT_BYTES = 1 << 20  # so large that the latency of a request is small beside its transfer


class KnownObjects:
    """The versions of the objects that a process has seen. Every later read must find the same."""

    def __init__(self, objects: Mapping[str, RemoteObject] | None = None) -> None:
        self._objects = dict(objects or {})
        self._listings: dict[str, dict[str, RemoteObject]] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[KnownObjects], tuple[dict[str, RemoteObject]]]:
        with self._lock:
            return KnownObjects, (dict(self._objects),)

    def get(self, path: RemotePath) -> RemoteObject | None:
        """Return the version of an object, or None if it has not been seen."""
        with self._lock:
            return self._objects.get(path.url)

    def add(self, path: RemotePath, version: RemoteObject) -> RemoteObject:
        """Remember the version of an object, and return the one that was seen first."""
        with self._lock:
            return self._objects.setdefault(path.url, version)

    def listing(self, path: RemotePath) -> dict[str, RemoteObject] | None:
        """Return the objects below a path, or None if they have not been listed."""
        with self._lock:
            return self._listings.get(path.url)

    def add_listing(self, path: RemotePath, listing: dict[str, RemoteObject]) -> None:
        """Remember the objects below a path, if there are any."""
        if listing:
            with self._lock:
                self._listings[path.url] = listing


@dataclass(frozen=True)
class CachedPath(RemotePath):
    """A URL whose objects are read through a cache.

    All reads of a process see one version of an object. If the store serves another one, they raise
    RunError.

    Args:
        cache: Keeps the ranges that were read.
    """

    unit_bytes: ClassVar[int] = UNIT_BYTES

    cache: RangeCache = field(kw_only=True, compare=False, repr=False)
    known: KnownObjects = field(
        kw_only=True, compare=False, repr=False, default_factory=KnownObjects
    )

    def list_objects(self) -> dict[str, RemoteObject]:
        """List all objects below at any depth, by their names relative to this path.

        The store is asked once.
        """
        listing = self.known.listing(self)
        if listing is None:
            listing = super().list_objects()
            listing = {name: self.known.add(self / name, item) for name, item in listing.items()}
            self.known.add_listing(self, listing)
        return dict(listing)

    def describe(self) -> RemoteObject:
        """Return the size and the version of the object that were seen first."""
        return self.known.get(self) or self.known.add(self, super().describe())

    def read_bytes(self, size: int | None = None) -> bytes:
        """Read the object, or only its first `size` bytes."""
        end = self.describe().size
        return self.read_range(0, end if size is None else min(size, end))

    def read_range(self, start: int, size: int) -> bytes:
        """Read `size` bytes from offset `start`, or fewer if the object ends earlier."""
        version = self.describe()
        size = min(size, version.size - start)
        if size <= 0:
            return b""
        key = f"{self.url}\0{version.version}\0{version.size}\0{start}\0{size}"
        return self.cache.get(key, size, lambda: self.read_range_of(version, start, size))

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """Read several objects below this path concurrently. Return them in the given order."""
        for folder in {name.partition("/")[0] for name in names if "/" in name}:
            (self / folder).list_objects()  # one request instead of one per object
        with ThreadPoolExecutor(CONCURRENT_READS) as pool:
            return list(pool.map(lambda name: (self / name).read_bytes(), names))
