"""Views of a mesh: RGBA images from seeded cameras under seeded lights, checked before they count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.core.cameras import Camera, sample_camera
from pipeline.core.errors import Reject
from pipeline.core.schema import Mesh, View
from pipeline.rendering.config import RenderConfig
from pipeline.rendering.gl_renderer import open_renderer, renderer_string
from pipeline.rendering.shading import lighting

__all__ = [
    "render_from",
    "render_views",
    "renderer_string",
    "view_numbers",
]


def render_views(mesh: Mesh, uid: str, cfg: RenderConfig) -> Iterator[View]:
    """Views 0..cfg.views-1 of a normalised mesh, in order; the same bytes on the same renderer.

    Reject, with the view and what was seen: "render_empty", "render_cut_off" (the object touches the border),
    "render_constant" (one colour all over), after cfg.attempts cameras. RunError without EGL.
    """
    with open_renderer(mesh, cfg.image_size) as drawing:
        for view in range(cfg.views):
            for attempt in range(cfg.attempts):
                eye = sample_camera(uid, view, cfg.cameras, attempt)
                rgba = unpremultiply(drawing.draw(eye, lighting(uid, view, eye, attempt)))
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
    """RGBA [size, size, 4], colour not premultiplied, of a mesh from each camera; nothing is checked.

    The lights are seeded by the word `lights` alone and travel with the camera. RunError without EGL.
    """
    with open_renderer(mesh, size) as drawing:
        for eye in eyes:
            yield unpremultiply(drawing.draw(eye, lighting(lights, 0, eye)))


def unpremultiply(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Colour divided by alpha, rounded; colour 0 where alpha is 0. Contiguous [H, W, 4]."""
    result = np.array(rgba, order="C")
    pixels = result.reshape(-1, 4)
    edges = np.flatnonzero(pixels[:, 3] - np.uint8(1) < 254)  # 0 wraps round to 255
    colors, alpha = pixels[edges, :3].astype(np.uint32), pixels[edges, 3:].astype(np.uint32)
    pixels[edges, :3] = np.minimum((colors * 255 + alpha // 2) // alpha, 255)
    return result


def _solid_colors(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGBA [N, 4] of the pixels that the object covers for the most part."""
    packed = rgba.view(np.uint32)[..., 0]  # one element a pixel: masking is several times faster
    return packed[rgba[..., 3] > 127].view(np.uint8).reshape(-1, 4)


def fault_of(rgba: NDArray[np.uint8], min_coverage: float) -> str | None:
    """Why a view is not worth keeping, or None: a Reject's reason.

    Constant: no channel varies by more than 2 of 255 over the pixels that the object covers. Shading makes a white
    ball vary by a hundred; what stays is a flat sheet without a texture, or one that light does not reach.
    """
    alpha = rgba[..., 3]
    if np.count_nonzero(alpha) < max(min_coverage * alpha.size, 1):
        return "render_empty"
    if alpha[[0, -1]].any() or alpha[:, [0, -1]].any():
        return "render_cut_off"
    solid = _solid_colors(rgba)[:, :3]
    varies = any(
        len(some) and np.ptp(some, axis=0).max() > 2 for some in (solid[::16], solid)
    )  # a sample often tells
    return None if varies or not len(solid) else "render_constant"


def view_numbers(views: Iterable[View]) -> dict[str, float]:
    """What the filter judges an asset's views by, 0..1: coverage, brightness and clipping over the object's pixels."""
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
