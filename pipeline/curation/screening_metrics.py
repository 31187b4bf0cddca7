"""Measurements of screening: solidity, leaks, detail, appearance, and signatures of the shape."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.grid import CELL_SIDE, spacing
from pipeline.core.primitives.triangles import pack
from pipeline.core.provenance import FORMAT_VERSION
from pipeline.core.schema import Material, Mesh
from pipeline.curation.config import ScreenConfig
from pipeline.curation.detail_metrics import (
    bend_length,
    coarse_cells,
    colors_seen,
    ground_share,
    largest_object,
)
from pipeline.curation.shape_moments import NUM_MOMENTS, SIGNATURES, shape_signatures
from pipeline.geometry.flood_fill import BARRIER_VOXELS, FloodFill, bin_triangles, flood_fill
from pipeline.geometry.sdf import compute_bricks
from pipeline.geometry.topology import BURIED, Topology
from pipeline.rendering.views import render_views, view_numbers
from pipeline.storage.remote import StorePath, arrow_source

# The key that seeds the views. It is the same for each asset, so that their numbers compare.
VIEW_SEED_KEY = "screening"
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
    relative_tokens: float  # tokens per cell of one side of the grid
    cap_share: float  # area of the caps that close openings, relative to the visible area
    bend: float  # integral of the absolute mean curvature over the visible surface
    sharp_length: float  # length of the visible edges that bend by more than 30 degrees
    colors_seen: float  # number of colours in the views, see `detail_metrics.colors_seen`
    object_share: float  # share of the surface that belongs to the largest separate object
    ground_share: float  # share of the lowest slab that is a bare ground plane
    visible_moments: bytes  # `surface_moments` of the visible surface, float32
    face_moments: bytes  # `surface_moments` of all faces, float32


def _arrow_type(field: Field[Any]) -> pa.DataType:
    if field.name in SIGNATURES:
        return pa.binary(4 * NUM_MOMENTS)
    return {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}[str(field.type)]


METRICS_SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        *((field.name, _arrow_type(field)) for field in fields(ScreeningMetrics)),
    ],
    metadata={"format_version": str(FORMAT_VERSION)},
)
# The columns of tables by metrics_version 1. Their assets can be read, but not be ranked again.
_COLUMNS_SINCE_2 = {
    *("relative_tokens", "cap_share", "bend", "sharp_length", "colors_seen", "object_share"),
    *("ground_share", *SIGNATURES),
}
METRICS_SCHEMA_1 = pa.schema(
    [
        *(column for column in METRICS_SCHEMA if column.name not in _COLUMNS_SINCE_2),
        ("occupancy", pa.binary(512)),  # packed bits of a 16^3 grid
        ("looks", pa.binary(32)),  # perceptual hashes of four views
    ],
    metadata=METRICS_SCHEMA.metadata,
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
    numbers: dict[str, Any] = {name: round(value, 6) for name, value in view_numbers(views).items()}
    solid_without_cracks = float(enclosed_grid_points(_flood_thicker_barrier(topology)) / box)
    visible = topology.triangles[topology.kinds != BURIED]
    bend, sharp_length = bend_length(visible)
    cells = coarse_cells(visible)
    visible_area = topology.numbers["visible_area"]
    return ScreeningMetrics(
        tokens=len(bricks.cells),
        solid_fraction=round(min(solid, 1.0), 6),  # the barrier can extend beyond the box
        leak_fraction=round(max(0.0, solid_without_cracks - solid), 6),
        sheet_share=round(topology.numbers["sheet_share"], 6),
        visible_area=round(visible_area, 6),
        textured=any(is_textured(part.material) for part in mesh.parts),
        colored=any(part.colors is not None for part in mesh.parts) or len(mesh.parts) > 1,
        relative_tokens=round(len(bricks.cells) * (CELL_SIDE / cfg.resolution) ** 2, 6),
        cap_share=round(topology.numbers["cap_area"] / visible_area, 6),
        bend=round(bend, 6),
        sharp_length=round(sharp_length, 6),
        colors_seen=round(colors_seen(views), 6),
        object_share=round(largest_object(cells), 6),
        ground_share=round(ground_share(cells), 6),
        **shape_signatures(mesh, topology),
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
    signatures = {name: bytes.fromhex(row[name]) for name in SIGNATURES}
    return ScreeningMetrics(**{**row, **signatures})


def write_metrics_table(path: Path, rows: Sequence[tuple[str, ScreeningMetrics]]) -> None:
    """Write the (uid, metrics) rows of one shard as Parquet. Equal rows give equal bytes."""
    table = pa.Table.from_pylist(
        [{"uid": uid, **asdict(metrics)} for uid, metrics in rows], METRICS_SCHEMA
    )
    pq.write_table(table, path, compression="zstd")


def read_metrics_table(path: StorePath) -> pa.Table:
    """Read the table of one shard, with the columns of METRICS_SCHEMA or METRICS_SCHEMA_1.

    Raises:
        ValueError: If the file cannot be read or is not a table of this format version.
    """
    try:
        table = pq.read_table(arrow_source(path))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} must be a readable table: {error}") from error
    known = (METRICS_SCHEMA, METRICS_SCHEMA_1)
    if not any(table.schema.equals(schema, check_metadata=True) for schema in known):
        raise ValueError(
            f"{path} must have the columns {METRICS_SCHEMA.names} of format_version "
            f"{FORMAT_VERSION}, got the columns {table.schema.names}"
        )
    return table
