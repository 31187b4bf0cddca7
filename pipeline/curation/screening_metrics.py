"""What screening measures of one asset: is it solid, does it leak, how does it look, by what is it known again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy.fft import dctn

from pipeline.core.grid import spacing
from pipeline.core.primitives.triangles import pack
from pipeline.core.provenance import FORMAT_VERSION
from pipeline.core.schema import Bricks, Mesh, View
from pipeline.curation.config import ScreenConfig
from pipeline.geometry.flood_fill import BARRIER_VOXELS, Exterior, bin_triangles, flood
from pipeline.geometry.sdf import compute_bricks
from pipeline.geometry.topology import Topology
from pipeline.rendering.views import render_views, view_numbers
from pipeline.storage.remote import StorePath, arrow_source

CELLS = 16  # along one side of the occupancy signature: 16^3 bits
CAMERAS = (
    "screening"  # seeds the views: the same for every asset, so that their hashes can be compared
)
METRICS_SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("tokens", pa.int64()),
        *(
            (name, pa.float64())
            for name in ("solid_fraction", "leak_fraction", "sheet_share", "visible_area")
        ),
        *(
            (name, pa.float64())
            for name in ("coverage_mean", "coverage_min", "brightness_mean", "contrast_mean")
        ),
        ("white_max", pa.float64()),
        *((name, pa.bool_()) for name in ("textured", "colored")),
        ("occupancy", pa.binary(CELLS**3 // 8)),
        ("looks", pa.binary(32)),  # 4 views of 64 bits
    ],
    metadata={"format_version": str(FORMAT_VERSION)},
)


@dataclass(frozen=True, kw_only=True)
class ScreeningMetrics:
    """One row of `screen/<R>/<shard>.parquet`, uid aside."""

    tokens: int  # at the screening's resolution
    solid_fraction: float  # of the bounding box that is enclosed
    leak_fraction: float  # of the bounding box that is enclosed only once cracks up to twice as wide are closed
    sheet_share: float  # of the visible surface
    visible_area: float
    coverage_mean: float
    coverage_min: float
    brightness_mean: float
    contrast_mean: float
    white_max: float
    textured: bool
    colored: bool
    occupancy: bytes
    looks: bytes


def compute_metrics(mesh: Mesh, topology: Topology, cfg: ScreenConfig) -> ScreeningMetrics:
    """Everything, from a normalised mesh. Reject as `render_views`."""
    bricks = compute_bricks(topology, cfg.resolution)
    box = bounding_box_grid_points(mesh, topology.resolution)
    solid = float(enclosed_grid_points(topology.exterior) / box)
    views = list(render_views(mesh, CAMERAS, cfg.render))
    numbers = {name: round(value, 6) for name, value in view_numbers(views).items()}
    return ScreeningMetrics(
        tokens=len(bricks.cells),
        solid_fraction=round(min(solid, 1.0), 6),  # the barrier may stick out of the box
        leak_fraction=round(
            max(0.0, float(enclosed_grid_points(_doubled(topology)) / box) - solid), 6
        ),
        sheet_share=round(topology.numbers["sheet_share"], 6),
        visible_area=round(topology.numbers["visible_area"], 6),
        textured=any(part.material.texture is not None for part in mesh.parts),
        colored=any(part.colors is not None for part in mesh.parts) or len(mesh.parts) > 1,
        occupancy=occupancy_signature(bricks),
        looks=b"".join(appearance_hash(view) for view in views),
        **numbers,
    )


def bounding_box_grid_points(mesh: Mesh, resolution: int) -> float:
    """How many points of the R^3 grid the bounding box holds, as a volume; at least one voxel thick."""
    h = spacing(resolution)
    return float(np.prod(np.maximum(np.ptp(mesh.vertices, axis=0), h)) / h**3)


def enclosed_grid_points(exterior: Exterior) -> float:
    """How many grid points the flood did not reach, those of the barrier counting half."""
    bins = exterior.bins
    inside = np.count_nonzero((bins.bin_of < 0) & ~exterior.whole) * 512
    inside += int(np.bitwise_count(~(exterior.outside | exterior.barrier)).sum())
    barrier = int(np.bitwise_count(exterior.barrier).sum())
    if not inside:  # nothing but surface: a sheet encloses nothing
        return 0.0
    return inside + barrier / 2


def _doubled(topology: Topology) -> Exterior:
    """The flood past a barrier twice as thick, which closes cracks twice as wide."""
    packed = pack(topology.triangles)
    bins = bin_triangles(packed, topology.resolution)
    return flood(packed, bins, np.ones(len(packed), np.bool_), 2 * BARRIER_VOXELS)


def occupancy_signature(bricks: Bricks) -> bytes:
    """Which cells of a 16^3 grid over the cube hold surface: the same for any winding, order and cut of the faces."""
    cells = np.zeros((CELLS,) * 3, bool)
    cells[tuple((bricks.cells.astype(np.int64) * 8 * CELLS // bricks.resolution).T)] = True
    return np.packbits(cells).tobytes()


def appearance_hash(view: View) -> bytes:
    """64 bits of a view's low frequencies, each above or below their median: a perceptual hash (DCT of 32 x 32)."""
    rgba = view.rgba.astype(np.float64)
    alpha = rgba[..., 3] / 255
    grey = rgba[..., :3] @ (0.299, 0.587, 0.114) * alpha + 128 * (1 - alpha)
    small = np.asarray(
        Image.fromarray(grey.astype(np.float32)).resize((32, 32), Image.Resampling.BOX)
    )
    low = np.asarray(dctn(small, norm="ortho"))[:8, :8].ravel()
    return np.packbits(low > np.median(low[1:])).tobytes()


def save_metrics(folder: Path, measured: ScreeningMetrics) -> None:
    row = {
        name: value.hex() if isinstance(value, bytes) else value
        for name, value in asdict(measured).items()
    }
    (folder / "measured.json").write_text(json.dumps(row))


def load_metrics(folder: Path) -> ScreeningMetrics:
    row = json.loads((folder / "measured.json").read_text())
    return ScreeningMetrics(
        **{
            **row,
            "occupancy": bytes.fromhex(row["occupancy"]),
            "looks": bytes.fromhex(row["looks"]),
        }
    )


def write_metrics_table(path: Path, rows: Sequence[tuple[str, ScreeningMetrics]]) -> None:
    """One shard's rows, in the given order. The same rows give the same bytes."""
    table = pa.Table.from_pylist(
        [{"uid": uid, **asdict(measured)} for uid, measured in rows], METRICS_SCHEMA
    )
    pq.write_table(table, path, compression="zstd")


def read_metrics_table(path: StorePath) -> pa.Table:
    """ValueError if it is not a table of this format version."""
    try:
        table = pq.read_table(arrow_source(path))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} must be a readable table: {error}") from error
    if not table.schema.equals(METRICS_SCHEMA, check_metadata=True):
        raise ValueError(
            f"{path} must have the columns {METRICS_SCHEMA.names} of format_version {FORMAT_VERSION}"
        )
    return table
