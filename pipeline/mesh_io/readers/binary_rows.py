"""Read rows of scalars and lists from binary data, with lists of different lengths."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.mesh_io.readers.text import ranges


@dataclass(frozen=True, kw_only=True)
class BinaryProperty:
    """A column of the rows.

    Attributes:
        name: Name of the column, unique among them.
        dtype: Type of the value, or of the items of a list.
        count_dtype: Type of the length that precedes the items of a list. None is a scalar.
    """

    name: str
    dtype: np.dtype[Any]
    count_dtype: np.dtype[Any] | None = None


@dataclass(kw_only=True)
class Rows:
    """Rows as columns.

    Attributes:
        count: Number of complete rows.
        end: Where the data after the rows begins.
        scalars: {name: [count]}.
        lists: {name: (items of all rows [T], length of each row int64 [count])}.
    """

    count: int
    end: int
    scalars: dict[str, NDArray[Any]] = field(default_factory=dict)
    lists: dict[str, tuple[NDArray[Any], NDArray[np.int64]]] = field(default_factory=dict)


def read_rows(content: bytes, start: int, count: int, properties: Sequence[BinaryProperty]) -> Rows:
    """Read up to `count` rows, or as many as are there.

    The memory is bounded by a multiple of the bytes that are there, whatever `count` is.

    Args:
        content: The data.
        start: Where the first row begins.
        count: Number of rows.
        properties: The columns.

    Returns:
        The complete rows. There are fewer than `count` if the data ends or a length is negative.
    """
    rows = _read_uniform_rows(content, start, count, properties)
    return _read_mixed_rows(content, start, count, properties) if rows is None else rows


def _read_uniform_rows(
    content: bytes, start: int, count: int, properties: Sequence[BinaryProperty]
) -> Rows | None:
    """Read the rows at once if their lists are as long as those of the first row, else None."""
    fields: list[tuple[Any, ...]] = []
    lengths: dict[str, int] = {}
    place = start
    for item in properties:
        if item.count_dtype is not None:
            if count == 0 or place + item.count_dtype.itemsize > len(content):
                lengths[item.name] = 0
            else:
                lengths[item.name] = int(np.frombuffer(content, item.count_dtype, 1, place)[0])
            if not 0 <= lengths[item.name] <= len(content):
                return None
            fields.append((f"length {item.name}", item.count_dtype))
            fields.append((f"value {item.name}", item.dtype, (lengths[item.name],)))
        else:
            fields.append((f"value {item.name}", item.dtype))
        place = start + np.dtype(fields).itemsize
    dtype = np.dtype(fields)
    if dtype.itemsize == 0:
        return Rows(count=count, end=start)
    complete = max(0, min(count, (len(content) - start) // dtype.itemsize))
    if complete < count and lengths:
        return None
    table = np.frombuffer(content, dtype, complete, start)
    if any((table[f"length {name}"] != length).any() for name, length in lengths.items()):
        return None
    rows = Rows(count=complete, end=start + complete * dtype.itemsize)
    for item in properties:
        values = np.ascontiguousarray(table[f"value {item.name}"])
        if item.count_dtype is None:
            rows.scalars[item.name] = values
        else:
            sizes = np.full(complete, lengths[item.name], dtype=np.int64)
            rows.lists[item.name] = (values.reshape(-1), sizes)
    return rows


def _read_mixed_rows(
    content: bytes, start: int, count: int, properties: Sequence[BinaryProperty]
) -> Rows:
    """Read rows with lists of different lengths: find each row, then gather the columns."""
    # A row is a sequence of segments: scalars, then the length of a list and its items.
    lists = [item for item in properties if item.count_dtype is not None]
    before = [0]  # bytes of the scalars before each list, and after the last
    offsets: dict[str, tuple[int, int]] = {}  # of scalars: segment, bytes from its begin
    for item in properties:
        if item.count_dtype is None:
            offsets[item.name] = (len(before) - 1, before[-1])
            before[-1] += item.dtype.itemsize
        else:
            before.append(0)
    begins, sizes, place = _find_lists(content, start, count, lists, before)

    complete = len(begins) // max(len(lists), 1)
    begin_table = np.frombuffer(begins, np.int64).reshape(complete, len(lists))
    size_table = np.frombuffer(sizes, np.int64).reshape(complete, len(lists))
    # Where the segments of each row begin.
    segments = np.empty((complete, len(lists) + 1), dtype=np.int64)
    for index, item in enumerate(lists):
        segments[:, index + 1] = begin_table[:, index] + size_table[:, index] * item.dtype.itemsize
    segments[:1, 0] = start
    segments[1:, 0] = segments[:-1, -1] + before[-1]

    raw = np.frombuffer(content, np.uint8)
    rows = Rows(count=complete, end=place)
    for name, (segment, offset) in offsets.items():
        dtype = next(item.dtype for item in properties if item.name == name)
        rows.scalars[name] = _gather(raw, segments[:, segment] + offset, dtype)
    for index, item in enumerate(lists):
        lengths = np.ascontiguousarray(size_table[:, index])
        width = item.dtype.itemsize
        within = ranges(np.zeros_like(lengths), lengths)
        places = np.repeat(begin_table[:, index], lengths) + width * within
        rows.lists[item.name] = (_gather(raw, places, item.dtype), lengths)
    return rows


def _find_lists(
    content: bytes, start: int, count: int, lists: Sequence[BinaryProperty], before: Sequence[int]
) -> tuple[array[int], array[int], int]:
    """Return where the items of each list begin, their numbers, and the end of the rows."""
    begins, sizes = array("q"), array("q")
    end = len(content)
    after = before[-1]
    plan = []
    for item, skipped in zip(lists, before, strict=False):
        assert item.count_dtype is not None
        kind = item.count_dtype
        order = "big" if kind.byteorder == ">" else "little"
        plan.append((skipped, kind.itemsize, order, kind.kind == "i", item.dtype.itemsize))
    place = start
    if len(plan) == 1 and plan[0][1] == 1 and not plan[0][3]:
        # The usual case: one list a row, with a length of one byte.
        skipped, _, _, _, width = plan[0]
        for _ in range(count):
            first = place + skipped + 1
            if first > end:
                break
            size = content[first - 1]
            following = first + size * width + after
            if following > end:
                break
            begins.append(first)
            sizes.append(size)
            place = following
        return begins, sizes, place
    from_bytes = int.from_bytes
    for _ in range(count):
        following = place
        found = []
        for skipped, length_bytes, order, signed, width in plan:
            first = following + skipped + length_bytes
            if first > end:
                return begins, sizes, place
            size = from_bytes(content[first - length_bytes : first], order, signed=signed)
            following = first + size * width
            found.append((first, size))
            if size < 0 or following > end:
                return begins, sizes, place
        if following + after > end:
            break
        for first, size in found:
            begins.append(first)
            sizes.append(size)
        place = following + after
    return begins, sizes, place


def _gather(
    raw: NDArray[np.uint8], places: NDArray[np.int64], dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Return the values that begin at byte `places` [N] of `raw`."""
    values = raw[places[:, None] + np.arange(dtype.itemsize)]  # [N, bytes of a value]
    return values.reshape(-1).view(dtype)


def to_float64(values: NDArray[Any]) -> NDArray[np.float64]:
    """Convert numbers of a file. Signalling NaNs, which NumPy warns about, become NaN."""
    with np.errstate(invalid="ignore"):
        return np.asarray(values, dtype=np.float64)


def to_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """Convert numbers of a file. Finite ones stay finite, and all others become NaN."""
    limit = float(np.finfo(np.float32).max)
    numbers = to_float64(values)
    clipped = np.clip(numbers, -limit, limit).astype(np.float32)
    return np.where(np.isfinite(numbers), clipped, np.float32(np.nan))
