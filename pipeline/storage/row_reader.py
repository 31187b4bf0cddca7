"""Rows of an array of a shard at a URL, read with one request instead of one for each chunk."""

from __future__ import annotations

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
        self._spans: NDArray[np.uint64] | None = None

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return the rows from `start` to before `stop`.

        Raises:
            ValueError: If the index is damaged. Damaged chunks raise RuntimeError.
        """
        if stop <= start:
            return np.zeros((0, *self.shape[1:]), self.dtype)
        first, last = start // self.chunk_rows, (stop - 1) // self.chunk_rows
        spans = self._index()[first : last + 1].astype(np.int64)
        begin, end = int(spans[:, 0].min()), int(spans.sum(1).max())
        data = self.file.read_range(begin, end - begin)
        rows = np.empty((len(spans) * self.chunk_rows, *self.shape[1:]), self.dtype)
        for number, (offset, size) in enumerate(spans - [begin, 0]):
            chunk = blosc.decompress(data[offset : offset + size])
            piece = rows[number * self.chunk_rows : (number + 1) * self.chunk_rows]
            piece[:] = np.frombuffer(chunk, self.dtype).reshape(piece.shape)
        skipped = first * self.chunk_rows
        return rows[start - skipped : stop - skipped]

    def _index(self) -> NDArray[np.uint64]:
        """Return offset and size of each chunk in the file, [chunks, 2]."""
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
            spans = np.frombuffer(index, "<u8").reshape(-1, 2)
            if spans.max() > total:
                raise ValueError(f"the index of the chunks of {self.file} exceeds the file")
            self._spans = spans
        return self._spans


def row_reader(array: zarr.Array[Any], path: StorePath) -> zarr.Array[Any] | RowReader:
    """Return what `read_rows` reads an array with: a RowReader at a URL, else the array itself."""
    return RowReader(array, path) if isinstance(path, RemotePath) else array


def read_rows(array: zarr.Array[Any] | RowReader, start: int, stop: int) -> NDArray[Any]:
    """Return consecutive rows of an array that is opened with Zarr, or of a RowReader."""
    if isinstance(array, RowReader):
        return array.read(start, stop)
    return np.asarray(array[start:stop])
