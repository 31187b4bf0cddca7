"""Renders the views of an asset: RGBA images from seeded cameras, in seeded light."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import degrees, radians
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.cameras import Camera, camera_of, sample_camera
from pipeline.core.errors import Reject
from pipeline.core.hashing import seed_of
from pipeline.core.schema import Mesh, View
from pipeline.rendering.config import RenderConfig
from pipeline.rendering.environments import count_environments
from pipeline.rendering.gl_context import renderer_string
from pipeline.rendering.gl_renderer import open_renderer
from pipeline.rendering.prefilter import EnvironmentLight, prepared_environment
from pipeline.rendering.shading import sample_lighting

__all__ = [
    "render_from",
    "render_views",
    "renderer_string",
    "view_numbers",
]


def render_views(
    mesh: Mesh, uid: str, cfg: RenderConfig, environments: Path | None = None
) -> Iterator[View]:
    """Render the views of an asset.

    Equal arguments give equal bytes on the same renderer, see `renderer_string`.

    Args:
        mesh: A normalised mesh.
        uid: The asset. It is the seed of cameras and lights.
        cfg: Number and size of the views, cameras, light and checks.
        environments: Directory of the HDR files of `cfg.environments`, None for the environments
            that the project makes.

    Yields:
        Views 0 .. cfg.views - 1 in order.

    Raises:
        Reject: "render_empty", "render_cut_off" if the object touches the border of the image, or
            "render_constant" if it has one colour, for all cfg.attempts cameras of a view. With
            image-based light, "render_constant" means that all views have one colour. With the
            cameras of a file, "render_empty" means that all views are empty.
        RunError: If no OpenGL context can be created.
    """
    if cfg.light == "lamps":
        yield from _render_with_lamps(mesh, uid, cfg)
    else:
        yield from _render_with_environments(mesh, uid, cfg, environments)


def _render_with_lamps(mesh: Mesh, uid: str, cfg: RenderConfig) -> Iterator[View]:
    with open_renderer(mesh, cfg.image_size) as renderer:

        def draw(eye: Camera, view: int, attempt: int) -> NDArray[np.uint8]:
            return unpremultiply(renderer.draw(eye, sample_lighting(uid, view, eye, attempt)))

        for shot in take_shots(uid, cfg, draw, fault_of):
            yield View(rgba=shot.pixels, meta=shot.meta(uid, cfg))


def _render_with_environments(
    mesh: Mesh, uid: str, cfg: RenderConfig, folder: Path | None
) -> Iterator[View]:
    varies = False
    with open_renderer(mesh, cfg.image_size, with_maps=True, with_shadows=True) as renderer:

        def draw(eye: Camera, view: int, attempt: int) -> NDArray[np.uint8]:
            light = sample_environment(uid, view, eye, attempt, folder)
            return unpremultiply(renderer.draw_environment(eye, light))

        for shot in take_shots(uid, cfg, draw, coverage_fault_of):
            light = sample_environment(uid, shot.view, shot.eye, shot.attempt, folder)
            varies = varies or not is_constant(shot.pixels)
            if shot.view == cfg.views - 1 and not varies:
                raise Reject("render_constant", views=cfg.views)
            meta = shot.meta(uid, cfg) | {
                "environment": light.environment.name,
                "environment_yaw_degrees": round(degrees(light.yaw), 6),
            }
            yield View(rgba=shot.pixels, meta=meta)


@dataclass(frozen=True, kw_only=True)
class Shot:
    """An accepted view.

    Attributes:
        view: Number of the view.
        attempt: Number of the camera among those that were tried.
        eye: The camera.
        pixels: What was drawn, [size, size, 4] with the coverage in alpha.
    """

    view: int
    attempt: int
    eye: Camera
    pixels: NDArray[np.uint8]

    def meta(self, uid: str, cfg: RenderConfig) -> dict[str, Any]:
        """Return the content of the view's json."""
        size = {"width": cfg.image_size, "height": cfg.image_size}
        return {"uid": uid, "view": self.view, **self.eye.meta(), **size}


def take_shots(
    uid: str,
    cfg: RenderConfig,
    draw: Callable[[Camera, int, int], NDArray[np.uint8]],
    fault_of_pixels: Callable[[NDArray[np.uint8], float], str | None],
) -> Iterator[Shot]:
    """Draw every view, with another camera where an image has a fault.

    The cameras of a file are not replaced.

    Args:
        uid: The asset.
        cfg: Number of the views, cameras and checks.
        draw: Draws from a camera, given the numbers of the view and of the attempt.
        fault_of_pixels: Returns the fault of an image for the smallest coverage, or None.

    Raises:
        Reject: If no camera of a view is accepted, or all cameras of a file see nothing.
    """
    given = cameras_of(cfg)
    seen = False
    for view in range(cfg.views):
        for attempt in range(1 if given else cfg.attempts):
            eye = given[view] if given else sample_camera(uid, view, cfg.cameras, attempt)
            pixels = draw(eye, view, attempt)
            fault = None if given else fault_of_pixels(pixels, cfg.min_coverage)
            if fault is None:
                break
        else:
            assert fault is not None
            raise Reject(
                fault,
                view=view,
                attempts=cfg.attempts,
                coverage=round(float((pixels[..., 3] > 0).mean()), 6),
            )
        seen = seen or bool(pixels[..., 3].any())
        if view == cfg.views - 1 and not seen:
            raise Reject("render_empty", views=cfg.views)
        yield Shot(view=view, attempt=attempt, eye=eye, pixels=pixels)


def cameras_of(cfg: RenderConfig) -> tuple[Camera, ...]:
    """Return the cameras of a file, () if views have sampled cameras."""
    return tuple(camera_of(json.loads(text), number) for number, text in enumerate(cfg.camera_list))


def sample_environment(
    uid: str, view: int, eye: Camera, attempt: int = 0, folder: Path | None = None
) -> EnvironmentLight:
    """Sample the environment of a view. The result depends on the arguments alone.

    The environment is turned so that its main light is within 75 degrees of the place that it has
    for a camera at azimuth 0, as a photographer turns an object.

    Args:
        uid: The asset.
        view: Number of the view.
        eye: The camera.
        attempt: 0 for the first camera of the view.
        folder: Directory of HDR files, None for the environments that the project makes.
    """
    generator = np.random.Generator(np.random.PCG64(seed_of(uid, "environment", view, attempt)))
    uniform = generator.random(2)
    number = int(uniform[0] * count_environments(folder))
    yaw = round(eye.azimuth_degrees + 75 * (2 * float(uniform[1]) - 1), 6)
    return EnvironmentLight(environment=prepared_environment(number, folder), yaw=radians(yaw))


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
    fault = coverage_fault_of(rgba, min_coverage)
    return "render_constant" if fault is None and is_constant(rgba) else fault


def coverage_fault_of(rgba: NDArray[np.uint8], min_coverage: float) -> str | None:
    """Return "render_empty" or "render_cut_off" if a view shows too little, or None.

    Args:
        rgba: uint8 [height, width, 4].
        min_coverage: Share of the image that the object must cover.
    """
    alpha = rgba[..., 3]
    if np.count_nonzero(alpha) < max(min_coverage * alpha.size, 1):
        return "render_empty"
    if alpha[[0, -1]].any() or alpha[:, [0, -1]].any():
        return "render_cut_off"
    return None


def is_constant(rgba: NDArray[np.uint8]) -> bool:
    """Return whether the object has one colour, see `fault_of`."""
    # every 16th pixel usually suffices
    solid = _solid_colors(rgba)[:, :3]
    varies = any(len(some) and np.ptp(some, axis=0).max() > 2 for some in (solid[::16], solid))
    return bool(len(solid)) and not varies


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
