"""Renders the views of an asset: RGBA images from seeded cameras, with seeded lights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.core.cameras import Camera, sample_camera
from pipeline.core.errors import Reject
from pipeline.core.schema import Mesh, View
from pipeline.rendering.config import RenderConfig
from pipeline.rendering.gl_context import renderer_string
from pipeline.rendering.gl_renderer import open_renderer
from pipeline.rendering.shading import sample_lighting

__all__ = [
    "render_from",
    "render_views",
    "renderer_string",
    "view_numbers",
]


def render_views(mesh: Mesh, uid: str, cfg: RenderConfig) -> Iterator[View]:
    """Render the views of an asset.

    Equal arguments give equal bytes on the same renderer, see `renderer_string`.

    Args:
        mesh: A normalised mesh.
        uid: The asset. It is the seed of cameras and lights.
        cfg: Number and size of the views, camera set and checks.

    Yields:
        Views 0 .. cfg.views - 1 in order.

    Raises:
        Reject: "render_empty", "render_cut_off" if the object touches the border of the image, or
            "render_constant" if it has one colour, for all cfg.attempts cameras of a view.
        RunError: If no OpenGL context can be created.
    """
    with open_renderer(mesh, cfg.image_size) as renderer:
        for view in range(cfg.views):
            for attempt in range(cfg.attempts):
                eye = sample_camera(uid, view, cfg.cameras, attempt)
                rgba = unpremultiply(renderer.draw(eye, sample_lighting(uid, view, eye, attempt)))
                fault = fault_of(rgba, cfg.min_coverage)
                if fault is None:
                    break
            else:
                assert fault is not None
                raise Reject(
                    fault,
                    view=view,
                    attempts=cfg.attempts,
                    coverage=round(float((rgba[..., 3] > 0).mean()), 6),
                )
            size = {"width": cfg.image_size, "height": cfg.image_size}
            yield View(rgba=rgba, meta={"uid": uid, "view": view, **eye.meta(), **size})


def render_from(
    mesh: Mesh, eyes: Iterable[Camera], size: int, lights: str = ""
) -> Iterator[NDArray[np.uint8]]:
    """Render a mesh from given cameras, without checks.

    Args:
        mesh: A normalised mesh.
        eyes: The cameras.
        size: Width and height of the images in pixels.
        lights: Seed of the lights. They move with the camera.

    Yields:
        uint8 [size, size, 4] RGBA, colour not premultiplied.

    Raises:
        RunError: If no OpenGL context can be created.
    """
    with open_renderer(mesh, size) as renderer:
        for eye in eyes:
            yield unpremultiply(renderer.draw(eye, sample_lighting(lights, 0, eye)))


def unpremultiply(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Divide the colour of an image by its alpha, and round.

    Args:
        rgba: uint8 [height, width, 4], premultiplied.

    Returns:
        Contiguous uint8 [height, width, 4]. Colour is 0 where alpha is 0.
    """
    result = np.array(rgba, order="C")
    pixels = result.reshape(-1, 4)
    edges = np.flatnonzero(pixels[:, 3] - np.uint8(1) < 254)  # alpha in 1..254: 0 wraps to 255
    colors, alpha = pixels[edges, :3].astype(np.uint32), pixels[edges, 3:].astype(np.uint32)
    pixels[edges, :3] = np.minimum((colors * 255 + alpha // 2) // alpha, 255)
    return result


def _solid_colors(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return RGBA [N, 4] of the pixels of which the object covers at least half."""
    packed = rgba.view(np.uint32)[..., 0]  # masking one element per pixel is several times faster
    return packed[rgba[..., 3] > 127].view(np.uint8).reshape(-1, 4)


def fault_of(rgba: NDArray[np.uint8], min_coverage: float) -> str | None:
    """Return the reason why a view is rejected, or None.

    A view is constant if no channel varies by more than 2 of 255 over the pixels of the object. The
    shading of a white ball varies by 100. What remains are flat sheets without a texture, and
    sheets that no light reaches.

    Args:
        rgba: uint8 [height, width, 4], colour not premultiplied.
        min_coverage: Share of the image that the object must cover.

    Returns:
        "render_empty", "render_cut_off", "render_constant" or None.
    """
    alpha = rgba[..., 3]
    if np.count_nonzero(alpha) < max(min_coverage * alpha.size, 1):
        return "render_empty"
    if alpha[[0, -1]].any() or alpha[:, [0, -1]].any():
        return "render_cut_off"
    # every 16th pixel usually suffices
    solid = _solid_colors(rgba)[:, :3]
    varies = any(len(some) and np.ptp(some, axis=0).max() > 2 for some in (solid[::16], solid))
    return None if varies or not len(solid) else "render_constant"


def view_numbers(views: Iterable[View]) -> dict[str, float]:
    """Measure the views of an asset for the filters.

    Returns:
        Numbers from 0 to 1: mean and smallest coverage of a view, mean brightness, mean standard
        deviation of the brightness, and the largest share of white pixels of a view. All but the
        coverage refer to the pixels of the object.
    """
    rows = []
    for view in views:
        alpha = view.rgba[..., 3]
        color = _solid_colors(view.rgba)[:, :3]
        mean = float(color.mean()) / 255 if len(color) else 0.0
        spread = float(color.max(axis=1).std()) / 255 if len(color) else 0.0
        white = float((color.min(axis=1) >= 254).mean()) if len(color) else 0.0
        rows.append((float((alpha > 127).mean()), mean, spread, white))
    coverage, brightness, contrast, white = np.array(rows).reshape(-1, 4).T
    return {
        "coverage_mean": float(coverage.mean()),
        "coverage_min": float(coverage.min()),
        "brightness_mean": float(brightness.mean()),
        "contrast_mean": float(contrast.mean()),
        "white_max": float(white.max()),
    }
