"""Pictures for the report: a stored render, the surface read back from the bricks, a slice through them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.cameras import look_at_origin
from pipeline.core.grid import CELL_SIDE
from pipeline.core.primitives.marching_cubes import extract
from pipeline.core.product import Product
from pipeline.core.schema import Bricks, Material, Mesh, Part
from pipeline.orchestration.commit import product_paths
from pipeline.rendering.gl_renderer import open_renderer
from pipeline.rendering.shading import lighting
from pipeline.rendering.views import unpremultiply
from pipeline.storage.remote import StorePath
from pipeline.storage.render_shard import RenderShard
from pipeline.storage.sdf_shard import SdfShard

PICTURES = ("render", "bricks", "slice")
SIDE = 192  # pixels of a picture
CLAY = Material(base_color=(0.30, 0.38, 0.48, 1.0))  # stands out from the page under any light
PAPER = np.array([238, 241, 245], np.float64)  # behind a render


@dataclass(frozen=True, kw_only=True)
class PictureJob:
    """Draw `folder/<uid>-<kind>.webp` for assets (shard, uid) of a build."""

    out: StorePath
    assets: tuple[tuple[str, str], ...]
    resolution: int
    cameras: str
    folder: Path


def draw(job: PictureJob) -> None:
    """One asset after the other; what is finished stays if a later one crashes."""
    for shard, uid in job.assets:
        bricks = SdfShard(job.out / product_paths(Product.sdf(job.resolution), shard)[0]).bricks(
            uid
        )
        view = RenderShard(job.out / product_paths(Product.renders(job.cameras), shard)[0]).read(
            uid, 0
        )
        save(job, uid, "render", on_paper(view.rgba))
        save(job, uid, "bricks", on_paper(draw_bricks(bricks, uid, view.meta)))
        save(job, uid, "slice", slice_picture(bricks))


def draw_bricks(bricks: Bricks, uid: str, meta: dict[str, float]) -> NDArray[np.uint8]:
    """RGBA [SIDE, SIDE, 4] of the surface in the bricks, from the camera and under the lights of a stored view."""
    vertices, faces = extract(bricks)
    eye = look_at_origin(meta["azimuth_degrees"], meta["elevation_degrees"], meta["focal_mm"])
    part = Part(vertices=slice(0, len(vertices)), faces=slice(0, len(faces)), material=CLAY)
    with open_renderer(Mesh(vertices=vertices, faces=faces, parts=(part,)), SIDE) as drawing:
        return unpremultiply(drawing.draw(eye, lighting(uid, int(meta["view"]), eye)))


def slice_picture(bricks: Bricks) -> NDArray[np.uint8]:
    """RGB [R, R, 3] of the grid plane closest to z = 0, y up: blue inside, orange outside, dark at the surface."""
    middle = bricks.resolution // 2
    side = bricks.resolution // CELL_SIDE
    here = bricks.cells[:, 2] == middle // CELL_SIDE
    cells = np.full((side, side, CELL_SIDE, CELL_SIDE), np.nan)
    x, y, _ = bricks.cells[here].T
    cells[x, y] = bricks.values[here].reshape(-1, CELL_SIDE, CELL_SIDE, CELL_SIDE)[
        ..., middle % CELL_SIDE
    ]
    plane = cells.transpose(0, 2, 1, 3).reshape(bricks.resolution, bricks.resolution).T[::-1]
    strength = np.abs(np.nan_to_num(plane))[..., None]
    color = np.where(
        np.nan_to_num(plane)[..., None] < 0, [53.0, 103.0, 176.0], [226.0, 138.0, 52.0]
    )
    shade = np.clip(1.15 * strength, 0.12, 1.0) * (color + (255 - color) * 0.65 * strength)
    return np.where(np.isnan(plane)[..., None], 255, np.minimum(shade, 255)).astype(np.uint8)


def on_paper(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB of an image with alpha laid over the page's grey."""
    alpha = rgba[..., 3:] / 255
    return (rgba[..., :3] * alpha + PAPER * (1 - alpha)).round().astype(np.uint8)


def save(job: PictureJob, uid: str, kind: str, rgb: NDArray[np.uint8]) -> None:
    method = Image.Resampling.NEAREST if len(rgb) < SIDE else Image.Resampling.LANCZOS
    Image.fromarray(rgb).resize((SIDE, SIDE), method).save(
        job.folder / f"{uid}-{kind}.webp", quality=80, method=4
    )


def warm_up() -> None:
    """Nothing to compile before the one call that a report makes."""
