"""Measurements of screening: solidity, leaks, appearance, and signatures to find duplicates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy.fft import dctn

from pipeline.core.grid import CELL_SIDE, spacing
from pipeline.core.primitives.triangles import pack
from pipeline.core.provenance import FORMAT_VERSION
from pipeline.core.schema import Bricks, Material, Mesh, View
from pipeline.curation.config import ScreenConfig
from pipeline.geometry.flood_fill import BARRIER_VOXELS, FloodFill, bin_triangles, flood_fill
from pipeline.geometry.sdf import compute_bricks
from pipeline.geometry.topology import Topology
from pipeline.rendering.views import render_views, view_numbers
from pipeline.storage.remote import StorePath, arrow_source

SIGNATURE_SIDE = 16  # cells along one side of the occupancy signature
# The key that seeds the views. It is the same for each asset, so that their hashes can be compared.
VIEW_SEED_KEY = "screening"
SIGNATURE_BYTES = {"occupancy": SIGNATURE_SIDE**3 // 8, "looks": 32}  # 4 views of 64 bits
METRICS_FILE = "measured.json"  # in an asset's folder of intermediate results


@dataclass(frozen=True, kw_only=True)
class ScreeningMetrics:
    """What screening measures of one asset: a row of `screen/<R>/<shard>.parquet`, no uid."""

    tokens: int  # SDF cells at the screening's resolution
    solid_fraction: float  # enclosed share of the bounding box
    leak_fraction: float  # share that is enclosed only after cracks up to twice as wide are closed
    sheet_share: float  # share of the visible surface that does not bound a solid
    visible_area: float  # in the cube of side 1
    coverage_mean: float  # share of the image that the object covers, over four views
    coverage_min: float
    brightness_mean: float  # of the object's pixels, 0 to 1
    contrast_mean: float  # standard deviation of the brightest channel, 0 to 1
    white_max: float  # share of overexposed pixels in the worst view
    textured: bool  # a material has a texture of its colour or its emission
    colored: bool  # vertex colours, or several materials
    occupancy: bytes  # see `occupancy_signature`
    looks: bytes  # `appearance_hash` of each view


def _arrow_type(field: Field[Any]) -> pa.DataType:
    if field.name in SIGNATURE_BYTES:
        return pa.binary(SIGNATURE_BYTES[field.name])
    return {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}[str(field.type)]


METRICS_SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        *((field.name, _arrow_type(field)) for field in fields(ScreeningMetrics)),
    ],
    metadata={"format_version": str(FORMAT_VERSION)},
)


def compute_metrics(mesh: Mesh, topology: Topology, cfg: ScreenConfig) -> ScreeningMetrics:
    """Measure one asset.

    Args:
        mesh: The normalised mesh.
        topology: Its topology.
        cfg: Resolution and image size.

    Raises:
        Reject: If a view cannot be rendered. See `pipeline.rendering.views.render_views`.
    """
    bricks = compute_bricks(topology, cfg.resolution)
    box = bounding_box_grid_points(mesh, topology.resolution)
    solid = float(enclosed_grid_points(topology.flood) / box)
    views = list(render_views(mesh, VIEW_SEED_KEY, cfg.render))
    numbers = {name: round(value, 6) for name, value in view_numbers(views).items()}
    solid_without_cracks = float(enclosed_grid_points(_flood_thicker_barrier(topology)) / box)
    return ScreeningMetrics(
        tokens=len(bricks.cells),
        solid_fraction=round(min(solid, 1.0), 6),  # the barrier can extend beyond the box
        leak_fraction=round(max(0.0, solid_without_cracks - solid), 6),
        sheet_share=round(topology.numbers["sheet_share"], 6),
        visible_area=round(topology.numbers["visible_area"], 6),
        textured=any(is_textured(part.material) for part in mesh.parts),
        colored=any(part.colors is not None for part in mesh.parts) or len(mesh.parts) > 1,
        occupancy=occupancy_signature(bricks),
        looks=b"".join(appearance_hash(view) for view in views),
        **numbers,
    )


def is_textured(material: Material) -> bool:
    """Return whether a texture of a material is drawn."""
    emits = any(material.emissive) and not material.unlit
    return material.texture is not None or (emits and material.emissive_texture is not None)


def bounding_box_grid_points(mesh: Mesh, resolution: int) -> float:
    """Return the volume of the bounding box in grid points. Each side is at least one voxel."""
    h = spacing(resolution)
    return float(np.prod(np.maximum(np.ptp(mesh.vertices, axis=0), h)) / h**3)


def enclosed_grid_points(flood: FloodFill) -> float:
    """Count the grid points that the flood did not reach. Points of the barrier count half."""
    bins = flood.bins
    inside = np.count_nonzero((bins.bin_of < 0) & ~flood.whole_cells) * CELL_SIDE**3
    inside += int(np.bitwise_count(~(flood.outside | flood.barrier)).sum())
    barrier = int(np.bitwise_count(flood.barrier).sum())
    if not inside:  # only the barrier itself: a sheet encloses nothing
        return 0.0
    return inside + barrier / 2


def _flood_thicker_barrier(topology: Topology) -> FloodFill:
    """Flood past a barrier twice as thick, which closes cracks twice as wide."""
    packed = pack(topology.triangles)
    bins = bin_triangles(packed, topology.resolution)
    return flood_fill(packed, bins, np.ones(len(packed), np.bool_), 2 * BARRIER_VOXELS)


def occupancy_signature(bricks: Bricks) -> bytes:
    """Return which cells of a 16^3 grid over the cube hold surface.

    The signature does not depend on the winding, order and subdivision of the faces.

    Returns:
        512 bytes, packed bits in the order x, y, z.
    """
    occupied = np.zeros((SIGNATURE_SIDE,) * 3, bool)
    cells = bricks.cells.astype(np.int64) * CELL_SIDE * SIGNATURE_SIDE // bricks.resolution
    occupied[tuple(cells.T)] = True
    return np.packbits(occupied).tobytes()


def appearance_hash(view: View) -> bytes:
    """Return a perceptual hash of a view: the signs of its low frequencies around their median.

    Returns:
        8 bytes: packed bits of the 8 x 8 lowest frequencies of a 32 x 32 cosine transform.
    """
    # Grey levels over a mid-grey background.
    rgba = view.rgba.astype(np.float64)
    alpha = rgba[..., 3] / 255
    grey = rgba[..., :3] @ (0.299, 0.587, 0.114) * alpha + 128 * (1 - alpha)
    image = Image.fromarray(grey.astype(np.float32))
    small = np.asarray(image.resize((32, 32), Image.Resampling.BOX))
    low = np.asarray(dctn(small, norm="ortho"))[:8, :8].ravel()
    return np.packbits(low > np.median(low[1:])).tobytes()  # the first is the mean, so not counted


def save_metrics(folder: Path, metrics: ScreeningMetrics) -> None:
    """Write the metrics of one asset as JSON to its folder of intermediate results."""
    row = {
        name: value.hex() if isinstance(value, bytes) else value
        for name, value in asdict(metrics).items()
    }
    (folder / METRICS_FILE).write_text(json.dumps(row), encoding="utf-8")


def load_metrics(folder: Path) -> ScreeningMetrics:
    """Read the metrics that `save_metrics` wrote."""
    row = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    signatures = {name: bytes.fromhex(row[name]) for name in ("occupancy", "looks")}
    return ScreeningMetrics(**{**row, **signatures})


def write_metrics_table(path: Path, rows: Sequence[tuple[str, ScreeningMetrics]]) -> None:
    """Write the (uid, metrics) rows of one shard as Parquet. Equal rows give equal bytes."""
    table = pa.Table.from_pylist(
        [{"uid": uid, **asdict(metrics)} for uid, metrics in rows], METRICS_SCHEMA
    )
    pq.write_table(table, path, compression="zstd")


def read_metrics_table(path: StorePath) -> pa.Table:
    """Read the table of one shard, with the columns of METRICS_SCHEMA.

    Raises:
        ValueError: If the file cannot be read or is not a table of this format version.
    """
    try:
        table = pq.read_table(arrow_source(path))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} must be a readable table: {error}") from error
    if not table.schema.equals(METRICS_SCHEMA, check_metadata=True):
        raise ValueError(
            f"{path} must have the columns {METRICS_SCHEMA.names} of format_version "
            f"{FORMAT_VERSION}, got the columns {table.schema.names}"
        )
    return table
