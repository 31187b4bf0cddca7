"""The SDF store: the bricks of one shard at one resolution, as a Zarr v3 directory anybody's Zarr can read."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc
from numpy.typing import DTypeLike, NDArray
from zarr.codecs import BloscCodec
from zarr.errors import BaseZarrError
from zarr.storage import FsspecStore

from pipeline.core.grid import CELL_SIDE, band, check_resolution, spacing
from pipeline.core.provenance import FORMAT_VERSION
from pipeline.core.schema import BRICK_ARRAYS, Bricks
from pipeline.storage.remote import RemotePath, StorePath, store_path

CHUNK = 1024  # rows of an array that are compressed together, and read together
POINTS = CELL_SIDE**3
LAYOUT: dict[str, tuple[str, tuple[int, ...]]] = {  # array -> dtype, shape of one row
    "blocks": ("int16", (3,)),
    "values": ("float16", (POINTS,)),
    "sharp": ("uint8", (POINTS // 8,)),
    "offsets": ("int64", ()),
}


class ArrayWriter:
    """Appends rows to a Zarr v3 array kept in a single shard file, one compressed chunk at a time.

    Zarr itself would hold the whole shard in memory. The bytes depend on the rows alone, not on how they were cut.
    """

    def __init__(self, group: Path, name: str, dtype: DTypeLike, row_shape: tuple[int, ...]):
        self.group, self.name, self.row_shape = group, name, row_shape
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.rows, self._index = 0, []
        self._pending: list[NDArray] = []
        self._pending_rows = 0
        folder = group / name / "/".join(["c", "0", *("0" for _ in row_shape[1:])])
        self._path = folder / "0" if row_shape else group / name / "c" / "0"
        self._file: BinaryIO | None = None

    def append(self, rows: NDArray) -> None:
        """Add [n, *row_shape] rows. ValueError on another shape or dtype."""
        if rows.shape[1:] != self.row_shape or rows.dtype != self.dtype:
            raise ValueError(
                f"{self.name} must be [n, {self.row_shape}] {self.dtype}, got {rows.shape} {rows.dtype}"
            )
        start = 0
        while start < len(rows):
            piece = rows[start : start + CHUNK - self._pending_rows]
            self._pending.append(np.array(piece))
            self._pending_rows += len(piece)
            start += len(piece)
            if self._pending_rows == CHUNK:
                self._flush()
        self.rows += len(rows)

    def close(self) -> None:
        """Write what is left, the shard's index and the array's metadata."""
        if self._pending_rows:
            self._flush()
        if self._file is not None:
            index = np.array(self._index, "<u8").tobytes()
            self._file.write(index + np.array(google_crc32c.value(index), "<u4").tobytes())
            self._file.close()
        shard_rows = max(len(self._index), 1) * CHUNK
        zarr.open_group(self.group, mode="r+", zarr_format=3).create_array(
            self.name,
            shape=(self.rows, *self.row_shape),
            dtype=self.dtype,
            chunks=(CHUNK, *self.row_shape),
            shards=(shard_rows, *self.row_shape),
            compressors=BloscCodec(
                cname="zstd", clevel=5, shuffle="shuffle", typesize=self.dtype.itemsize
            ),
            fill_value=0,
        )

    def _flush(self) -> None:
        chunk = np.zeros((CHUNK, *self.row_shape), self.dtype)
        np.concatenate(self._pending, out=chunk[: self._pending_rows])
        blosc.use_threads = False  # the frame's bytes must not depend on the number of threads
        data = blosc.compress(chunk, b"zstd", 5, blosc.SHUFFLE, 0)
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("wb")
        self._index.append((self._file.tell(), len(data)))
        self._file.write(data)
        self._pending, self._pending_rows = [], 0


def write_sdf_shard(
    path: Path, resolution: int, assets: Iterable[tuple[str, Bricks]], config_hash: str
) -> int:
    """Write (uid, bricks) in the given order to a new directory `path`; returns the number of blocks.

    Holds one asset and one chunk in memory. ValueError if a brick has another resolution or a uid comes twice.
    """
    path.mkdir(parents=True)
    zarr.create_group(path, zarr_format=3)
    arrays = {field: ArrayWriter(path, name, *LAYOUT[name]) for field, name in BRICK_ARRAYS.items()}
    offsets, uids = [0], []
    for uid, bricks in assets:
        if bricks.resolution != resolution or uid in uids:
            raise ValueError(
                f"{uid}: needs resolution {resolution} and a new uid, got {bricks.resolution}"
            )
        for field, array in arrays.items():
            array.append(getattr(bricks, field))
        uids.append(uid)
        offsets.append(offsets[-1] + len(bricks.cells))
    arrays["offsets"] = ArrayWriter(path, "offsets", *LAYOUT["offsets"])
    arrays["offsets"].append(np.array(offsets, np.int64))
    for array in arrays.values():
        array.close()
    attributes = {**shard_attributes(resolution), "uids": uids, "config_hash": config_hash}
    zarr.open_group(path, mode="r+", zarr_format=3).update_attributes(attributes)
    return offsets[-1]


def shard_attributes(resolution: int) -> dict[str, int | float]:
    """What every store at this resolution says about its grid."""
    return {
        "format_version": FORMAT_VERSION,
        "resolution": resolution,
        "tau": band(resolution),
        "block_size": CELL_SIDE,
        "origin": -0.5,
        "spacing": spacing(resolution),
    }


class SdfShard:
    """Reads `sdf/<R>/<shard>.zarr`, at a path or URL. ValueError if it is not one, or of another format version.

    `uids` in row order, `offsets` int64 [A+1], `resolution`; an asset's bricks are read when asked for.
    """

    def __init__(self, path: StorePath | str):
        self.path = store_path(path)
        try:
            group = zarr.open_group(_zarr_store(self.path), mode="r", zarr_format=3)
            self._arrays = {name: _array(group, name) for name in LAYOUT}
        except (OSError, KeyError, BaseZarrError) as error:
            raise ValueError(
                f"{self.path} must be an SDF shard (a Zarr v3 group of {', '.join(LAYOUT)})"
            ) from error
        self.attributes = dict(group.attrs)
        version = self.attributes.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{self.path} must have format_version {FORMAT_VERSION}, got {version}: rebuild it"
            )
        self.resolution = check_resolution(int(str(self.attributes.get("resolution"))))
        self.uids: list[str] = list(self.attributes["uids"])  # pyright: ignore[reportArgumentType]
        self.offsets: NDArray[np.int64] = np.asarray(self._arrays["offsets"][:])
        self._row = {uid: row for row, uid in enumerate(self.uids)}

    def __len__(self) -> int:
        return len(self.uids)

    def bricks(self, asset: int | str) -> Bricks:
        """One asset, by row or uid; reads the chunks it lies in and no others. KeyError for an unknown uid."""
        row = self._row[asset] if isinstance(asset, str) else range(len(self))[asset]
        rows = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        arrays = {
            field: np.asarray(self._arrays[name][rows]) for field, name in BRICK_ARRAYS.items()
        }
        return Bricks(resolution=self.resolution, **arrays)

    def tokens(self, asset: int | str) -> int:
        """How many blocks an asset has."""
        row = self._row[asset] if isinstance(asset, str) else range(len(self))[asset]
        return int(self.offsets[row + 1] - self.offsets[row])

    def dense(self, asset: int | str) -> NDArray[np.float32]:
        """[R, R, R] of sdf / tau, NaN where no block is stored. For small R."""
        bricks = self.bricks(asset)
        side = self.resolution // CELL_SIDE
        cells = np.full((side, side, side, CELL_SIDE, CELL_SIDE, CELL_SIDE), np.nan, np.float32)
        cells[tuple(bricks.cells.T)] = bricks.values.reshape(-1, CELL_SIDE, CELL_SIDE, CELL_SIDE)
        return cells.transpose(0, 3, 1, 4, 2, 5).reshape((self.resolution,) * 3)


def check_sdf_shard(path: Path, uids: list[str] | None = None) -> list[str]:
    """Every rule of the format that the store breaks, as "uid: rule" or "rule"; [] if it is sound.

    `uids`: the assets it must hold, in order, where the caller knows.
    """
    try:
        shard = SdfShard(path)
    except ValueError as error:
        return [str(error)]
    problems = list(_layout_problems(shard))
    if uids is not None and shard.uids != uids:
        problems.append(
            f"uids must be the {len(uids)} assets of the manifest in row order, got {len(shard.uids)}"
        )
    if problems:
        return problems
    for row, uid in enumerate(shard.uids):
        try:
            bricks = shard.bricks(row)
        except (ValueError, RuntimeError, OSError) as error:  # a chunk that does not decode
            problems.append(f"{uid}: unreadable blocks: {error}")
            continue
        problems += [f"{uid}: {rule}" for rule in brick_problems(bricks)]
    return problems


def brick_problems(bricks: Bricks) -> Iterator[str]:
    """The rules that one asset's bricks break."""
    blocks, values = bricks.cells.astype(np.int64), bricks.values
    if not len(blocks):
        yield "has no blocks"
        return
    side = bricks.resolution // CELL_SIDE
    if blocks.min() < 0 or blocks.max() >= side:
        yield f"block index outside 0..{side - 1}"
        return
    step = np.diff((blocks[:, 0] * side + blocks[:, 1]) * side + blocks[:, 2])
    if (step == 0).any():
        yield f"{(step == 0).sum()} duplicate blocks"
    if (step < 0).any():
        yield "blocks not in x, y, z order"
    if not np.isfinite(values).all():
        yield "values not finite"
        return
    if np.abs(values).max() > 1:
        yield "values outside [-1, 1]"
    active = np.abs(values) < 1
    alive = np.asarray(active.any(axis=1))
    lonely = (~_have_neighbour(blocks[~alive], blocks[alive])).sum()
    if lonely:
        yield f"{lonely} blocks without an active point"
    sharp = np.unpackbits(bricks.sharp, axis=1, bitorder="little").astype(bool)
    stray = sharp & ~active
    rows = np.flatnonzero(stray.any(axis=1))
    stray = (stray[rows] & ~_beside_active(active[rows])).sum()
    if stray:
        yield f"{stray} sharp points that are not active"


# Rounding to f16 makes |sdf| just below tau a 1, so that an active point, or a whole layer of them along a flat face,
# may not look active. The surface is then a few voxels away, and points between it and them are.
_NEIGHBOURS = np.array([step for step in itertools.product((-1, 0, 1), repeat=3) if any(step)])


def _have_neighbour(blocks: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which blocks [m, 3] have one of the others [M, 3] among their 26 neighbours."""
    side = np.iinfo(np.int16).max  # no neighbour wraps around
    weights = np.array([side * side, side, 1])
    keys = blocks @ weights
    return np.asarray(np.isin(keys[:, None] + _NEIGHBOURS @ weights, others @ weights).any(axis=1))


def _beside_active(active: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which points [m, 512] have an active one among their 26 neighbours, or lie at their block's border."""
    cells = np.pad(
        active.reshape(-1, CELL_SIDE, CELL_SIDE, CELL_SIDE),
        ((0, 0), (1, 1), (1, 1), (1, 1)),
        constant_values=False,
    )
    near = np.zeros((len(active), CELL_SIDE, CELL_SIDE, CELL_SIDE), bool)
    for x, y, z in _NEIGHBOURS + 1:
        near |= cells[:, x : x + CELL_SIDE, y : y + CELL_SIDE, z : z + CELL_SIDE]
    border = np.ones((CELL_SIDE,) * 3, bool)
    border[1:-1, 1:-1, 1:-1] = False
    return np.asarray(near | border).reshape(-1, POINTS)


def _layout_problems(shard: SdfShard) -> Iterator[str]:
    rows = len(shard.uids)
    total = int(shard.offsets[-1]) if len(shard.offsets) else 0
    for name, (dtype, row_shape) in LAYOUT.items():
        array = shard._arrays[name]
        want = ((rows + 1) if name == "offsets" else total, *row_shape)
        if array.dtype != np.dtype(dtype) or array.shape != want:
            yield f"{name} must be {list(want)} {dtype}, is {list(array.shape)} {array.dtype}"
    for name, value in shard_attributes(shard.resolution).items():
        if shard.attributes.get(name) != value:
            yield f"attribute {name} must be {value}, is {shard.attributes.get(name)}"
    if not isinstance(shard.attributes.get("config_hash"), str):
        yield "attribute config_hash is missing"
    if len(set(shard.uids)) != rows:
        yield "a uid comes twice"
    if len(shard.offsets) and (
        shard.offsets[0] != 0 or any(b < a for a, b in itertools.pairwise(shard.offsets))
    ):
        yield "offsets must rise from 0"


def _zarr_store(path: StorePath) -> Any:
    if isinstance(path, RemotePath):
        return FsspecStore.from_url(path.url, path.options, read_only=True)
    return path


def _array(group: zarr.Group, name: str) -> zarr.Array:
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise KeyError(name)
    return array
