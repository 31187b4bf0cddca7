"""Pictures of the report: a stored render, the surface of the bricks, and a slice through them."""

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
from pipeline.rendering.gl_renderer import open_renderer
from pipeline.rendering.shading import sample_lighting
from pipeline.rendering.views import unpremultiply
from pipeline.storage.layout import product_paths
from pipeline.storage.remote import StorePath
from pipeline.storage.render_shard import RenderShard
from pipeline.storage.sdf_shard import SdfShard

PICTURES = ("render", "bricks", "slice")
PICTURE_SIDE = 192  # pixels
# Stands out from the page under any light.
PICTURE_FOCAL_MM = 100.0
SURFACE_MATERIAL = Material(base_color=(0.30, 0.38, 0.48, 1.0))
PAGE_COLOR = np.array([238, 241, 245], np.float64)  # behind a render
INSIDE_COLOR = [53.0, 103.0, 176.0]
OUTSIDE_COLOR = [226.0, 138.0, 52.0]


@dataclass(frozen=True, kw_only=True)
class PictureJob:
    """A request to draw `folder`/<uid>-<kind>.webp for several assets of a build.

    Attributes:
        out: Output directory or URL of the build.
        assets: Pairs (shard, uid).
        resolution: Resolution of the bricks.
        cameras: Camera set of the renders.
        folder: Directory for the pictures.
    """

    out: StorePath
    assets: tuple[tuple[str, str], ...]
    resolution: int
    cameras: str
    folder: Path


def draw(job: PictureJob) -> None:
    """Draw the pictures of one asset after the other. Finished ones stay if a later one crashes."""
    sdf = Product.sdf(job.resolution)
    renders = Product.renders(job.cameras)
    for shard, uid in job.assets:
        bricks = SdfShard(job.out / product_paths(sdf, shard)[0]).bricks(uid)
        view = RenderShard(job.out / product_paths(renders, shard)[0]).read(uid, 0)
        save(job, uid, "render", over_page_color(view.rgba))
        save(job, uid, "bricks", over_page_color(draw_bricks(bricks, uid, view.meta)))
        save(job, uid, "slice", slice_picture(bricks))


def draw_bricks(bricks: Bricks, uid: str, meta: dict[str, float]) -> NDArray[np.uint8]:
    """Draw the surface of bricks with the camera and the lights of a stored view.

    Args:
        bricks: The bricks.
        uid: The asset.
        meta: The JSON of the stored view, with its camera.

    Returns:
        uint8 [PICTURE_SIDE, PICTURE_SIDE, 4], not premultiplied by alpha.
    """
    vertices, faces = extract(bricks)
    # an orthographic camera has no focal length
    focal = meta["focal_mm"] or PICTURE_FOCAL_MM
    eye = look_at_origin(meta["azimuth_degrees"], meta["elevation_degrees"], focal)
    part = Part(
        vertices=slice(0, len(vertices)), faces=slice(0, len(faces)), material=SURFACE_MATERIAL
    )
    mesh = Mesh(vertices=vertices, faces=faces, parts=(part,))
    with open_renderer(mesh, PICTURE_SIDE) as renderer:
        return unpremultiply(renderer.draw(eye, sample_lighting(uid, int(meta["view"]), eye)))


def slice_picture(bricks: Bricks) -> NDArray[np.uint8]:
    """Draw the grid plane closest to z = 0, seen from +z.

    Returns:
        uint8 [R, R, 3], y upwards. The inside is blue, the outside orange, the surface dark, and
        cells that are not stored are white.
    """
    # Gather the layer of the middle cells that holds the plane: [side, side, 8, 8].
    middle = bricks.resolution // 2
    side = bricks.resolution // CELL_SIDE
    in_layer = bricks.cells[:, 2] == middle // CELL_SIDE
    layer = np.full((side, side, CELL_SIDE, CELL_SIDE), np.nan)
    x, y, _ = bricks.cells[in_layer].T
    values = bricks.values[in_layer].reshape(-1, CELL_SIDE, CELL_SIDE, CELL_SIDE)
    layer[x, y] = values[..., middle % CELL_SIDE]
    plane = layer.transpose(0, 2, 1, 3).reshape(bricks.resolution, bricks.resolution).T[::-1]
    # Colour by sign; darken near the surface and fade towards the edge of the band.
    sdf = np.nan_to_num(plane)[..., None]
    strength = np.abs(sdf)
    color = np.where(sdf < 0, INSIDE_COLOR, OUTSIDE_COLOR)
    shade = np.clip(1.15 * strength, 0.12, 1.0) * (color + (255 - color) * 0.65 * strength)
    return np.where(np.isnan(plane)[..., None], 255, np.minimum(shade, 255)).astype(np.uint8)


def over_page_color(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Blend an RGBA image [H, W, 4] over the colour of the page. Return uint8 [H, W, 3]."""
    alpha = rgba[..., 3:] / 255
    return (rgba[..., :3] * alpha + PAGE_COLOR * (1 - alpha)).round().astype(np.uint8)


def save(job: PictureJob, uid: str, kind: str, rgb: NDArray[np.uint8]) -> None:
    """Scale an RGB image [H, W, 3] to the size of the pictures and write it."""
    small = len(rgb) < PICTURE_SIDE
    method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    Image.fromarray(rgb).resize((PICTURE_SIDE, PICTURE_SIDE), method).save(
        job.folder / f"{uid}-{kind}.webp", quality=80, method=4
    )


def warm_up() -> None:
    """Do nothing. A report makes a single call, before which nothing needs to be compiled."""
