"""Rows of an array of a shard at a URL, read with one request instead of one for each chunk."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc  # pyright: ignore[reportAttributeAccessIssue]
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from pipeline.storage.remote import RemotePath, StorePath

CHECKSUM_BYTES = 4


class RowReader:
    """Reads consecutive rows of an array that `ArrayWriter` wrote. Threads may share it.

    Zarr asks for the index of the chunks and for each chunk, one after another. The index is kept
    here, and neighbouring chunks are one range. The rows are those that Zarr returns.

    At a cached path, the chunks that begin in the same unit of `unit_bytes` are one range. Assets
    that lie side by side then share a download.

    Args:
        array: The array, opened with Zarr. It must be chunked along its rows alone, compressed by
            Blosc, and stored in one file with the index of its chunks at the end.
        path: URL of the array.

    Raises:
        ValueError: If the array has another layout.
    """

    def __init__(self, array: zarr.Array[Any], path: RemotePath):
        chunks, shards = array.chunks, array.shards
        compressors = array.compressors
        is_ours = (
            shards is not None
            and chunks[1:] == shards[1:] == array.shape[1:]
            and shards[0] >= array.shape[0]
            and len(compressors) == 1
            and isinstance(compressors[0], BloscCodec)
        )
        if not is_ours or shards is None:
            raise ValueError(
                f"{path} must be one file of Blosc chunks along the first axis, "
                f"got chunks {chunks} in shards {shards}"
            )
        self.shape, self.dtype = array.shape, array.dtype
        self.chunk_rows = chunks[0]
        self.num_chunks = shards[0] // chunks[0]
        self.file = path / "/".join(["c", *("0" for _ in array.shape)])
        self._spans: NDArray[np.int64] | None = None

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the rows from `start` to before `stop`.

        Raises:
            ValueError: If the index is damaged. Damaged chunks raise RuntimeError.
        """
        if stop <= start:
            return np.zeros((0, *self.shape[1:]), self.dtype)
        first, last = start // self.chunk_rows, (stop - 1) // self.chunk_rows
        spans = self.read_index()
        rows = np.empty(((last + 1 - first) * self.chunk_rows, *self.shape[1:]), self.dtype)
        for chunks in self._ranges(spans, first, last):
            of_range = spans[chunks.start : chunks.stop]
            begin, end = int(of_range[:, 0].min()), int(of_range.sum(1).max())
            data = memoryview(self.file.read_range(begin, end - begin))
            for number in range(max(chunks.start, first), min(chunks.stop, last + 1)):
                offset, size = spans[number] - [begin, 0]
                chunk = blosc.decompress(data[offset : offset + size])
                piece = rows[(number - first) * self.chunk_rows :][: self.chunk_rows]
                piece[:] = np.frombuffer(chunk, self.dtype).reshape(piece.shape)
        skipped = first * self.chunk_rows
        return rows[start - skipped : stop - skipped]

    def _ranges(self, spans: NDArray[np.int64], first: int, last: int) -> list[range]:
        """Return the numbers of the chunks that are read together to have `first` to `last`."""
        if not self.file.unit_bytes:
            return [range(first, last + 1)]
        units = spans[:, 0] // self.file.unit_bytes
        edges = [0, *(np.flatnonzero(np.diff(units)) + 1).tolist(), len(spans)]
        ranges = [range(*pair) for pair in itertools.pairwise(edges)]
        return [chunks for chunks in ranges if chunks.stop > first and chunks.start <= last]

    def read_index(self) -> NDArray[np.int64]:
        """Return offset and size of each chunk in the file, [chunks, 2]. It is read once.

        Raises:
            ValueError: If the index is damaged.
        """
        if self._spans is None:
            size = 16 * self.num_chunks + CHECKSUM_BYTES
            total = self.file.describe().size
            data = self.file.read_range(max(total - size, 0), size)
            index, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
            if (
                len(data) != size
                or google_crc32c.value(index).to_bytes(CHECKSUM_BYTES, "little") != checksum
            ):
                raise ValueError(f"the index of the chunks of {self.file} is damaged")
            stored = np.frombuffer(index, "<u8").reshape(-1, 2)
            if stored.max() > total:
                raise ValueError(f"the index of the chunks of {self.file} exceeds the file")
            self._spans = stored.astype(np.int64)
        return self._spans


def row_readers(
    arrays: Mapping[str, zarr.Array[Any]], group: StorePath
) -> dict[str, zarr.Array[Any] | RowReader]:
    """Return what `read_rows` reads the arrays of a group with.

    These are RowReaders at a URL, whose indexes are read at the same time, else the arrays.
    """
    if not isinstance(group, RemotePath):
        return dict(arrays)
    readers = {name: RowReader(array, group / name) for name, array in arrays.items()}
    if group.unit_bytes:
        with ThreadPoolExecutor(len(readers)) as pool:
            list(pool.map(RowReader.read_index, readers.values()))
    return dict(readers)


def read_rows(array: zarr.Array[Any] | RowReader, start: int, stop: int) -> NDArray[Any]:
    """Return consecutive rows of an array that is opened with Zarr, or of a RowReader."""
    if isinstance(array, RowReader):
        return array.read(start, stop)
    return np.asarray(array[start:stop])
