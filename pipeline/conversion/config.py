"""Options of the commands that convert: export and watertight."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.core.grid import band, check_resolution, spacing
from pipeline.core.options import at_least, between, check_bounds
from pipeline.mesh_io.config import LoadConfig
from pipeline.storage.config import PathOrUrl

Trainer = Literal["hunyuan3d-2.1", "dora", "step1x-3d", "ultrashape"]
ULTRASHAPE_POINTS = 300_000  # its loader takes no other number
CUBE_DIAGONAL = 3**0.5  # of a cube of the grid, in voxels


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write training samples of a build's finished assets in the layout of another trainer.

    The meshes are read again from the sources of the build. Run the command again to resume.
    """

    directory: Annotated[PathOrUrl, tyro.conf.Positional]
    """Output directory of the build, or its URL."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Directory of the samples. It is created, or belongs to an earlier run with these options."""

    to: Literal["vecset"] = "vecset"
    """Kind of the samples. "vecset" are points on the surface and on sharp edges with normals, and
    points of the volume with signed distances."""

    trainer: Trainer = "hunyuan3d-2.1"
    """Trainer whose data loader reads the samples. It decides the names of files and arrays, the
    frame, the types and the sign of the distances."""

    points: int | None = at_least(16, None)
    """Number of uniform surface points of each asset, and of sharp-edge points. None takes 124,928
    for hunyuan3d-2.1, 32,768 for dora, 200,000 for step1x-3d, and 300,000 for ultrashape, whose
    loader accepts no other number."""

    space_points: int | None = at_least(16, None)
    """Number of points that are spread evenly over the volume. None takes 249,856 for
    hunyuan3d-2.1, 200,000 for dora and step1x-3d, and 400,000 for ultrashape."""

    sharp_degrees: float = between(1, 179, 15.0)
    """Dihedral angle in degrees above which an edge is sharp. The angle of two coplanar faces is
    0."""

    smooth_assets: Literal["uniform", "skip"] = "uniform"
    """What happens to assets without a sharp edge. "uniform" fills their sharp-edge points with
    uniform ones, "skip" leaves the assets out."""

    resolution: int | None = None
    """Resolution that decides how thick the shells of open surfaces are: 1.74 of its voxels. None
    takes the finest resolution of the build."""

    images: bool = True
    """Whether the renders of the build are written for loaders that read images: those of
    hunyuan3d-2.1, step1x-3d and ultrashape. They need a build with renders."""

    split: Literal["all", "train", "val"] = "all"
    """Split of the exported assets."""

    source: tuple[str, ...] = ()
    """Sources that hold the assets now, as in pipeline.build. Nothing takes those of the build."""

    limit: int | None = at_least(1, None)
    """Number of assets to take from the start of the build. None takes all."""

    compress: bool = False
    """Whether the npz files are compressed. They take about a third less space and are slower to
    read."""

    seed: int = 0
    """Seed of the samples. It is combined with the uid of each asset."""

    workers: int = at_least(1, 1)
    """Number of assets processed at the same time. Each takes one core."""

    asset_timeout_s: float = 900.0
    """Wall time in seconds that one asset may take. An asset that takes longer is recorded as
    failed."""

    asset_memory_gb: float = 8.0
    """Memory in gigabytes that the process of one asset may allocate."""

    def __post_init__(self):
        check_bounds(self)
        if self.resolution is not None:
            check_resolution(self.resolution)
        if self.trainer == "ultrashape" and self.points not in (None, ULTRASHAPE_POINTS):
            raise ValueError(
                f"points must be {ULTRASHAPE_POINTS} for ultrashape, whose loader accepts no other "
                f"number, got {self.points}"
            )
        for name in ("asset_timeout_s", "asset_memory_gb"):
            if not 0 < getattr(self, name) < 1e9:
                raise ValueError(
                    f"{name} must be positive and below 1e9, got {getattr(self, name)}"
                )


def max_thickening(resolution: int) -> float:
    """Return by how many voxels a surface can be moved outwards within the band of the bricks.

    All corners of a cube that the moved surface crosses must be stored.
    """
    return int(100 * (band(resolution) / spacing(resolution) - CUBE_DIAGONAL)) / 100


@dataclass(frozen=True, kw_only=True)
class WatertightConfig:
    """Turn one mesh file into a closed mesh, and report what was done and how far it moved.

    Openings up to a size are closed, open surfaces become thin shells, and inner walls that nobody
    sees from outside are removed.
    """

    mesh: Annotated[Path, tyro.conf.Positional]
    """Mesh file of any format that pipeline.build reads, such as glb, obj, ply or stl."""

    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Closed mesh to write: a file that ends in glb, obj, ply or stl. None writes NAME.closed.glb
    into the working directory."""

    resolution: int = 512
    """Number of grid points along one side of the cube around the mesh, a multiple of 8. Details
    below a voxel are lost. The longest side of the mesh has 0.95 times as many voxels."""

    thicken: float = 0.0
    """Distance in voxels by which the whole surface is moved outwards, so that walls thinner than a
    voxel survive. At most 2.26 at resolution 512 and above, 1.26 at 384 and 0.26 at 256."""

    max_opening: float = 0.05
    """Largest opening that is closed, 0 to 1. It is measured as the share of all directions in
    which the space behind the opening sees out. 0 closes no opening."""

    up: Literal["auto", "y", "z"] = "auto"
    """Axis that points up in files that do not state one. "auto" takes y. The result has y up."""

    samples: int = at_least(1000, 200_000)
    """Number of points on each surface with which the distances are measured."""

    report: Path | None = None
    """File to which the report is also written as JSON."""

    load: LoadConfig = field(default_factory=LoadConfig)

    def __post_init__(self):
        check_bounds(self)
        check_resolution(self.resolution)
        if self.resolution < 64:
            raise ValueError(f"resolution must be 64 or more, got {self.resolution}")
        if not 0 <= self.max_opening <= 1:
            raise ValueError(f"max_opening must lie in 0..1, got {self.max_opening}")
        most = max_thickening(self.resolution)
        if not 0 <= self.thicken <= most:
            raise ValueError(
                f"thicken must be from 0 to {most} at resolution {self.resolution}, "
                f"got {self.thicken:g}"
            )
