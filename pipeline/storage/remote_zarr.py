"""A read-only Zarr store over the objects below a URL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype

from pipeline.storage.remote import RemotePath, StorePath

SMALL_BYTES = 4 << 10
CONCURRENT_READS = 8


class RemoteStore(Store):
    """Reads the keys of a Zarr group as objects below a URL.

    The objects are listed once, so that a missing key costs no request. The descriptions of the
    arrays and other small objects are read at the same time and kept in memory.

    Args:
        path: The URL of the group.
    """

    supports_writes: bool = False  # pyright: ignore[reportAssignmentType]
    supports_deletes: bool = False  # pyright: ignore[reportAssignmentType]
    supports_listing: bool = True  # pyright: ignore[reportAssignmentType]

    def __init__(self, path: RemotePath):
        super().__init__(read_only=True)
        self.path = path
        self._sizes = {name: found.size for name, found in path.list_objects().items()}
        small = [
            name
            for name, size in self._sizes.items()
            if name.endswith("zarr.json") or 0 < size <= SMALL_BYTES
        ]
        with ThreadPoolExecutor(CONCURRENT_READS) as pool:
            contents = pool.map(lambda name: (path / name).read_bytes(), small)
            self._contents = dict(zip(small, contents, strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteStore) and other.path == self.path

    __hash__ = None

    def __str__(self) -> str:
        return str(self.path)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the bytes of a key, or None if there is no such key."""
        size = self._sizes.get(key)
        if size is None:
            return None
        start, end = _range(byte_range, size)
        content = self._contents.get(key)
        if content is not None:
            return prototype.buffer.from_bytes(content[start:end])
        data = await asyncio.to_thread((self.path / key).read_range, start, end - start)
        return prototype.buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return several ranges, read concurrently."""
        return await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges))

    async def exists(self, key: str) -> bool:
        """Return whether there is an object for the key."""
        return key in self._sizes

    async def list(self) -> AsyncIterator[str]:
        """Yield all keys."""
        for key in self._sizes:
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield the keys that begin with `prefix`."""
        for key in self._sizes:
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names one level below `prefix`."""
        start = f"{prefix.strip('/')}/".lstrip("/")
        names = (
            key[len(start) :].partition("/")[0] for key in self._sizes if key.startswith(start)
        )
        for name in dict.fromkeys(names):
            yield name

    async def set(self, key: str, value: Buffer) -> None:
        """Raise ValueError, because the store is read-only."""
        self._check_writable()

    async def delete(self, key: str) -> None:
        """Raise ValueError, because the store is read-only."""
        self._check_writable()


def _range(request: ByteRequest | None, size: int) -> tuple[int, int]:
    """Return the first byte of a request and the one after the last, for an object of `size`."""
    match request:
        case None:
            return 0, size
        case RangeByteRequest(start, end):
            return start, min(end, size)
        case OffsetByteRequest(offset):
            return min(offset, size), size
        case SuffixByteRequest(suffix):
            return max(size - suffix, 0), size
    raise ValueError(f"unknown range {request}")


def zarr_store(path: StorePath) -> Any:
    """Return what Zarr opens a group from: a local path as it is, or a store over a URL."""
    return RemoteStore(path) if isinstance(path, RemotePath) else path
