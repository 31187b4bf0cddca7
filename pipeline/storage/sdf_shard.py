"""SDF shards: the bricks of one shard at one resolution, in a Zarr v3 group.

The arrays of a group have one row per cell (8^3 grid points), and the cells of an asset are
consecutive:

    blocks   int16   [M, 3]    cell index along x, y, z; sorted within each asset
    values   float16 [M, 512]  clamp(sdf / tau, -1, 1); point (x, y, z) of a cell is 64x + 8y + z
    sharp    uint8   [M, 64]   bits of the points near sharp edges, in the same order, LSB first
    offsets  int64   [A + 1]   the rows of asset a are offsets[a] .. offsets[a + 1] - 1

Any Zarr v3 implementation can read them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc
from numpy.typing import DTypeLike, NDArray
from zarr.codecs import BloscCodec
from zarr.errors import BaseZarrError

from pipeline.core.grid import CELL_SIDE, band, check_resolution, spacing
from pipeline.core.provenance import FORMAT_VERSION
from pipeline.core.schema import BRICK_ARRAYS, Bricks
from pipeline.storage.remote import StorePath, store_path
from pipeline.storage.remote_zarr import zarr_store
from pipeline.storage.row_reader import read_rows, row_readers

CHUNK_ROWS = 1024  # rows of an array that are compressed and read together
POINTS_PER_CELL = CELL_SIDE**3
ARRAYS: dict[str, tuple[str, tuple[int, ...]]] = {  # name -> dtype, shape of one row
    "blocks": ("int16", (3,)),
    "values": ("float16", (POINTS_PER_CELL,)),
    "sharp": ("uint8", (POINTS_PER_CELL // 8,)),
    "offsets": ("int64", ()),
}


class ArrayWriter:
    """Appends rows to a Zarr v3 array, one compressed chunk at a time.

    Zarr's own writer would hold the whole array in memory, because the array is stored in a single
    file. The bytes of the file depend on the rows alone, not on how they were split into calls.

    Args:
        group: Directory of an existing Zarr v3 group.
        name: Name of the array.
        dtype: Type of the elements. It is stored in little-endian byte order.
        row_shape: Shape of one row.
    """

    def __init__(self, group: Path, name: str, dtype: DTypeLike, row_shape: tuple[int, ...]):
        self.group = group
        self.name = name
        self.row_shape = row_shape
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.rows = 0
        self._index: list[tuple[int, int]] = []  # offset and size of every chunk in the file
        self._pending: list[NDArray] = []
        self._pending_rows = 0
        zeros = ["0" for _ in row_shape]
        self._path = group.joinpath(name, "c", "0", *zeros)
        self._file: BinaryIO | None = None

    def append(self, rows: NDArray) -> None:
        """Append rows.

        Args:
            rows: [n, *row_shape] of the writer's dtype.

        Raises:
            ValueError: If the rows have another shape or dtype.
        """
        if rows.shape[1:] != self.row_shape or rows.dtype != self.dtype:
            raise ValueError(
                f"{self.name} must be [n, {self.row_shape}] {self.dtype}, "
                f"got {rows.shape} {rows.dtype}"
            )
        start = 0
        while start < len(rows):
            piece = rows[start : start + CHUNK_ROWS - self._pending_rows]
            self._pending.append(np.array(piece))
            self._pending_rows += len(piece)
            start += len(piece)
            if self._pending_rows == CHUNK_ROWS:
                self._write_chunk()
        self.rows += len(rows)

    def close(self) -> None:
        """Write the last chunk, the index of the chunks and the metadata of the array."""
        if self._pending_rows:
            self._write_chunk()
        if self._file is not None:
            index = np.array(self._index, "<u8").tobytes()
            checksum = np.array(google_crc32c.value(index), "<u4").tobytes()
            self._file.write(index + checksum)
            self._file.close()
        shard_rows = max(len(self._index), 1) * CHUNK_ROWS
        zarr.open_group(self.group, mode="r+", zarr_format=3).create_array(
            self.name,
            shape=(self.rows, *self.row_shape),
            dtype=self.dtype,
            chunks=(CHUNK_ROWS, *self.row_shape),
            shards=(shard_rows, *self.row_shape),
            compressors=BloscCodec(
                cname="zstd", clevel=5, shuffle="shuffle", typesize=self.dtype.itemsize
            ),
            fill_value=0,
        )

    def _write_chunk(self) -> None:
        chunk = np.zeros((CHUNK_ROWS, *self.row_shape), self.dtype)
        np.concatenate(self._pending, out=chunk[: self._pending_rows])
        blosc.use_threads = False  # the bytes must not depend on the number of threads
        data = blosc.compress(chunk, b"zstd", 5, blosc.SHUFFLE, 0)
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("wb")
        self._index.append((self._file.tell(), len(data)))
        self._file.write(data)
        self._pending = []
        self._pending_rows = 0


def write_sdf_shard(
    path: Path, resolution: int, assets: Iterable[tuple[str, Bricks]], config_hash: str
) -> int:
    """Write a shard. One asset and one chunk at a time are in memory.

    Args:
        path: The new directory of the shard.
        resolution: Resolution of the bricks.
        assets: A pair (uid, bricks) for each asset, in the order of the plan.
        config_hash: Hash of the build's configuration, which the shard records.

    Returns:
        The number of cells written.

    Raises:
        ValueError: If bricks have another resolution or a uid occurs twice.
    """
    path.mkdir(parents=True)
    zarr.create_group(path, zarr_format=3)
    arrays = {field: ArrayWriter(path, name, *ARRAYS[name]) for field, name in BRICK_ARRAYS.items()}
    offsets = [0]
    uids: list[str] = []
    for uid, bricks in assets:
        if bricks.resolution != resolution or uid in uids:
            raise ValueError(
                f"{uid}: needs resolution {resolution} and a new uid, got {bricks.resolution}"
            )
        for field, array in arrays.items():
            array.append(getattr(bricks, field))
        uids.append(uid)
        offsets.append(offsets[-1] + len(bricks.cells))
    arrays["offsets"] = ArrayWriter(path, "offsets", *ARRAYS["offsets"])
    arrays["offsets"].append(np.array(offsets, np.int64))
    for array in arrays.values():
        array.close()
    attributes = {**shard_attributes(resolution), "uids": uids, "config_hash": config_hash}
    zarr.open_group(path, mode="r+", zarr_format=3).update_attributes(attributes)
    return offsets[-1]


def shard_attributes(resolution: int) -> dict[str, int | float]:
    """Return the attributes that every SDF shard of this resolution has.

    "tau" is the band and "spacing" the distance of grid points, in units of the cube's side.
    Grid point i lies at "origin" + i * "spacing". "block_size" is the side of a cell.
    """
    return {
        "format_version": FORMAT_VERSION,
        "resolution": resolution,
        "tau": band(resolution),
        "block_size": CELL_SIDE,
        "origin": -0.5,
        "spacing": spacing(resolution),
    }


class SdfShard:
    """Random access to the bricks of an SDF shard at a path or URL.

    The offsets are held in memory. The bricks of an asset are read when they are asked for.

    Args:
        path: The directory `sdf/<resolution>/<shard>.zarr` of a build.

    Attributes:
        resolution: Grid points along one side of the cube.
        uids: The assets, in the order of the plan.
        offsets: int64 [A + 1], the first row of each asset and the end.
        attributes: The attributes of the Zarr group, see `shard_attributes`.

    Raises:
        ValueError: If there is no SDF shard, or it has another format version.
    """

    def __init__(self, path: StorePath | str):
        self.path = store_path(path)
        try:
            group = zarr.open_group(zarr_store(self.path), mode="r", zarr_format=3)
            self._arrays = {name: _array(group, name) for name in ARRAYS}
        except (OSError, KeyError, BaseZarrError) as error:
            raise ValueError(
                f"{self.path} must be an SDF shard (a Zarr v3 group of {', '.join(ARRAYS)})"
            ) from error
        self.attributes = dict(group.attrs)
        version = self.attributes.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{self.path} must have format_version {FORMAT_VERSION}, got {version}; rebuild it"
            )
        self.resolution = check_resolution(int(str(self.attributes.get("resolution"))))
        self.uids: list[str] = list(self.attributes["uids"])  # pyright: ignore[reportArgumentType]
        self.offsets: NDArray[np.int64] = np.asarray(self._arrays["offsets"][:])
        self._rows = {uid: row for row, uid in enumerate(self.uids)}
        self._readers = row_readers(
            {name: self._arrays[name] for name in BRICK_ARRAYS.values()}, self.path
        )

    def __len__(self) -> int:
        """Return the number of assets."""
        return len(self.uids)

    def bricks(self, asset: int | str) -> Bricks:
        """Read the bricks of one asset. Only the chunks that hold them are read.

        Args:
            asset: The uid of the asset, or its position in `uids`.

        Raises:
            KeyError: If there is no such uid.
            IndexError: If there is no such position.
        """
        row = self._row_of(asset)
        start, stop = int(self.offsets[row]), int(self.offsets[row + 1])
        arrays = {
            field: read_rows(self._readers[name], start, stop)
            for field, name in BRICK_ARRAYS.items()
        }
        return Bricks(resolution=self.resolution, **arrays)

    def tokens(self, asset: int | str) -> int:
        """Return the number of cells of an asset, given by uid or position, without reading them.

        Raises:
            KeyError: If there is no such uid.
            IndexError: If there is no such position.
        """
        row = self._row_of(asset)
        return int(self.offsets[row + 1] - self.offsets[row])

    def dense(self, asset: int | str) -> NDArray[np.float32]:
        """Read the SDF of one asset as a dense grid. Meant for low resolutions.

        Args:
            asset: The uid of the asset, or its position in `uids`.

        Returns:
            float32 [R, R, R] of clamp(sdf / tau, -1, 1), indexed by x, y, z. NaN in cells that are
            not stored.

        Raises:
            KeyError: If there is no such uid.
            IndexError: If there is no such position.
        """
        bricks = self.bricks(asset)
        side = self.resolution // CELL_SIDE
        cells = np.full((side, side, side, CELL_SIDE, CELL_SIDE, CELL_SIDE), np.nan, np.float32)
        cells[tuple(bricks.cells.T)] = bricks.values.reshape(-1, CELL_SIDE, CELL_SIDE, CELL_SIDE)
        return cells.transpose(0, 3, 1, 4, 2, 5).reshape((self.resolution,) * 3)

    def _row_of(self, asset: int | str) -> int:
        return self._rows[asset] if isinstance(asset, str) else range(len(self))[asset]


def check_sdf_shard(path: Path, uids: list[str] | None = None) -> list[str]:
    """Check a shard against the format.

    Args:
        path: The directory of the shard.
        uids: The assets that the shard must have, in this order. None accepts any assets.

    Returns:
        Every problem as "uid: rule", or as "rule" if it concerns the whole shard. Empty if the
        shard is sound.
    """
    try:
        shard = SdfShard(path)
    except ValueError as error:
        return [str(error)]
    problems = list(_layout_problems(shard))
    if uids is not None and shard.uids != uids:
        problems.append(
            f"uids must be the {len(uids)} assets of the manifest in row order, "
            f"got {len(shard.uids)}"
        )
    if problems:
        return problems
    for row, uid in enumerate(shard.uids):
        try:
            bricks = shard.bricks(row)
        except (ValueError, RuntimeError, OSError) as error:  # a chunk that cannot be decoded
            problems.append(f"{uid}: unreadable bricks: {error}")
            continue
        problems += [f"{uid}: {rule}" for rule in brick_problems(bricks)]
    return problems


def brick_problems(bricks: Bricks) -> Iterator[str]:
    """Yield the rules of the format that the bricks of one asset break."""
    cells = bricks.cells.astype(np.int64)
    values = bricks.values
    if not len(cells):
        yield "has no cells"
        return
    # The cells must lie in the grid, in order, each once.
    side = bricks.resolution // CELL_SIDE
    if cells.min() < 0 or cells.max() >= side:
        yield f"a cell index is outside 0..{side - 1}"
        return
    step = np.diff((cells[:, 0] * side + cells[:, 1]) * side + cells[:, 2])
    if (step == 0).any():
        yield f"has {(step == 0).sum()} duplicate cells"
    if (step < 0).any():
        yield "cells are not in x, y, z order"
    # Values must be finite and truncated.
    if not np.isfinite(values).all():
        yield "values are not finite"
        return
    if np.abs(values).max() > 1:
        yield "values are outside [-1, 1]"
    # A cell is stored because it has an active point, and only active points are sharp. Rounding to
    # float16 turns |sdf| just below tau into 1, so that an active point, or a whole layer of them
    # along a flat face, may not look active. In that case the surface is a few grid points away,
    # and the points between look active. So neighbours of active cells and points are accepted.
    active = np.abs(values) < 1
    has_active = np.asarray(active.any(axis=1))
    isolated = (~_have_neighbour(cells[~has_active], cells[has_active])).sum()
    if isolated:
        yield f"has {isolated} cells without an active point"
    sharp = np.unpackbits(bricks.sharp, axis=1, bitorder="little").astype(bool)
    sharp_inactive = sharp & ~active
    rows = np.flatnonzero(sharp_inactive.any(axis=1))
    isolated = (sharp_inactive[rows] & ~_near_active(active[rows])).sum()
    if isolated:
        yield f"has {isolated} sharp points that are not active"


_NEIGHBOURS = np.array([step for step in itertools.product((-1, 0, 1), repeat=3) if any(step)])


def _have_neighbour(cells: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each of `cells` [m, 3] whether one of its 26 neighbours is in `others` [n, 3]."""
    side = np.iinfo(np.int16).max  # so large that no neighbour wraps around
    weights = np.array([side * side, side, 1])
    keys = cells @ weights
    return np.asarray(np.isin(keys[:, None] + _NEIGHBOURS @ weights, others @ weights).any(axis=1))


def _near_active(active: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which points [m, 512] have an active neighbour in their cell, or lie at its border."""
    padded = np.pad(
        active.reshape(-1, CELL_SIDE, CELL_SIDE, CELL_SIDE),
        ((0, 0), (1, 1), (1, 1), (1, 1)),
        constant_values=False,
    )
    near = np.zeros((len(active), CELL_SIDE, CELL_SIDE, CELL_SIDE), bool)
    for x, y, z in _NEIGHBOURS + 1:
        near |= padded[:, x : x + CELL_SIDE, y : y + CELL_SIDE, z : z + CELL_SIDE]
    border = np.ones((CELL_SIDE,) * 3, bool)
    border[1:-1, 1:-1, 1:-1] = False
    return np.asarray(near | border).reshape(-1, POINTS_PER_CELL)


def _layout_problems(shard: SdfShard) -> Iterator[str]:
    """Yield the rules that shapes, dtypes, attributes and offsets break."""
    assets = len(shard.uids)
    cells = int(shard.offsets[-1]) if len(shard.offsets) else 0
    for name, (dtype, row_shape) in ARRAYS.items():
        array = shard._arrays[name]
        shape = ((assets + 1) if name == "offsets" else cells, *row_shape)
        if array.dtype != np.dtype(dtype) or array.shape != shape:
            yield f"{name} must be {list(shape)} {dtype}, is {list(array.shape)} {array.dtype}"
    for name, value in shard_attributes(shard.resolution).items():
        if shard.attributes.get(name) != value:
            yield f"attribute {name} must be {value}, is {shard.attributes.get(name)}"
    if not isinstance(shard.attributes.get("config_hash"), str):
        yield "attribute config_hash is missing"
    if len(set(shard.uids)) != assets:
        yield "a uid occurs twice"
    if len(shard.offsets) and (
        shard.offsets[0] != 0 or any(b < a for a, b in itertools.pairwise(shard.offsets))
    ):
        yield "offsets must begin with 0 and must not decrease"


def _array(group: zarr.Group, name: str) -> zarr.Array:
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise KeyError(name)
    return array
