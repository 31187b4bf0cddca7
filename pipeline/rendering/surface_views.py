"""What views show besides colour: normals, depth, albedo, metallic and roughness, and masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.cameras import Camera
from pipeline.core.image_codec import encode, encode_exr, encode_png
from pipeline.core.schema import Mesh, View
from pipeline.rendering.config import RenderConfig
from pipeline.rendering.gl_renderer import open_renderer
from pipeline.rendering.views import coverage_fault_of, take_shots, unpremultiply


def surface_views(
    mesh: Mesh, uid: str, cfg: RenderConfig, kind: str
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Draw one kind of views of an asset. The cameras are those of renders in image-based light.

    Args:
        mesh: A normalised mesh.
        uid: The asset.
        cfg: Number and size of the views and their cameras. The light is not used.
        kind: A kind of `pipeline.core.product.VIEW_KINDS` other than "renders".

    Yields:
        The encoded file of each view and the content of its json.

    Raises:
        Reject: If no camera of a view is accepted, see `take_shots`.
        RunError: If no OpenGL context can be created.
    """
    is_material = kind == "metallic-roughness"
    with open_renderer(mesh, cfg.image_size, with_maps=True) as renderer:

        def draw(eye: Camera, view: int, attempt: int) -> NDArray[np.uint8]:
            del view, attempt
            return renderer.draw_property(eye, "MATERIAL" if is_material else "ALBEDO")

        for shot in take_shots(uid, cfg, draw, coverage_fault_of):
            meta = shot.meta(uid, cfg)
            if kind in ("normals", "depth"):
                normals, depth = renderer.draw_normals_and_depth(shot.eye)
                if kind == "normals":
                    yield encode_exr(normals.astype(np.float16), ("R", "G", "B")), meta
                else:
                    yield encode_exr(depth[..., None], ("Z",)), meta
            elif kind == "mask":
                yield encode_png(shot.pixels[..., 3]), meta
            else:
                yield encode(View(rgba=unpremultiply(shot.pixels), meta=meta)), meta


def view_cameras(mesh: Mesh, uid: str, cfg: RenderConfig) -> list[Camera]:
    """Return the cameras of an asset's views, those of renders in image-based light.

    Raises:
        Reject: If no camera of a view is accepted, see `take_shots`.
        RunError: If no OpenGL context can be created.
    """
    with open_renderer(mesh, cfg.image_size) as renderer:
        shots = take_shots(
            uid, cfg, lambda eye, *_: renderer.draw_property(eye, "ALBEDO"), coverage_fault_of
        )
        return [shot.eye for shot in shots]
