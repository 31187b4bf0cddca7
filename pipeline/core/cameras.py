"""Pinhole cameras that look at the origin: sampling from a camera set, and projection."""

from __future__ import annotations

from dataclasses import dataclass
from math import atan, cos, degrees, radians, sin
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.core.hashing import seed_of
from pipeline.core.options import CameraSet

SENSOR_MM = 36.0  # side of the square sensor
RADIUS = 0.866  # radius of the sphere that fits the image: half the diagonal of the unit cube
FOCAL_MM = (30.0, 100.0)  # Direct3D-S2 paper (arXiv 2505.17412), section 2


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole camera with square pixels that looks at the origin. World y is up in the image.

    Attributes:
        azimuth_degrees: Angle around the y axis. At 0 the eye is on +z (the front of the object),
            at 90 on +x.
        elevation_degrees: Angle of the eye above the horizontal plane.
        focal_mm: Focal length for a square sensor of 36 mm.
        distance: Distance of the eye from the origin, in units of the cube's side.
        fov_degrees: Field of view of the whole image, the same horizontally and vertically.
        c2w: float64 [4, 4], camera-to-world matrix with OpenGL axes. Its columns are right, up,
            backwards and the eye.
    """

    azimuth_degrees: float
    elevation_degrees: float
    focal_mm: float
    distance: float
    fov_degrees: float
    c2w: NDArray[np.float64]
    projection: Literal["perspective", "orthographic"] = "perspective"
    ortho_scale: float = 0.0

    def meta(self) -> dict[str, Any]:
        """Return what the json of a view says about its camera."""
        return {
            "c2w": self.c2w.tolist(),
            "fov_degrees": self.fov_degrees,
            "focal_mm": self.focal_mm,
            "sensor_mm": SENSOR_MM,
            "azimuth_degrees": self.azimuth_degrees,
            "elevation_degrees": self.elevation_degrees,
            "distance": self.distance,
        }


def look_at_origin(azimuth_degrees: float, elevation_degrees: float, focal_mm: float) -> Camera:
    """Return the camera at a direction, so far away that the sphere of radius 0.866 fits its image.

    Args:
        azimuth_degrees: See `Camera`.
        elevation_degrees: See `Camera`.
        focal_mm: See `Camera`.
    """
    fov = 2 * atan(SENSOR_MM / 2 / focal_mm)
    distance = RADIUS / sin(fov / 2)
    azimuth = radians(azimuth_degrees)
    elevation = radians(elevation_degrees)
    right = np.array([cos(azimuth), 0.0, -sin(azimuth)])
    backwards = np.array(
        [cos(elevation) * sin(azimuth), sin(elevation), cos(elevation) * cos(azimuth)]
    )
    c2w = np.eye(4)
    c2w[:3] = np.stack([right, np.cross(backwards, right), backwards, distance * backwards], axis=1)
    return Camera(
        azimuth_degrees=azimuth_degrees,
        elevation_degrees=elevation_degrees,
        focal_mm=focal_mm,
        # Rounded, because the last bit of a sine differs between platforms and must not change the
        # bytes of a build.
        distance=round(distance, 12),
        fov_degrees=round(degrees(fov), 12),
        c2w=c2w.round(12) + 0.0,
    )


def sample_camera(uid: str, view: int, kind: CameraSet = "paper", attempt: int = 0) -> Camera:
    """Sample the camera of a view. The result depends on the arguments alone.

    Args:
        uid: The asset.
        view: Number of the view.
        kind: The camera set. "paper" has azimuths uniform in 0..180 degrees, elevations in 10..40
            degrees and focal lengths in 30..100 mm. "wide" has the same focal lengths and
            directions that are uniform on the sphere.
        attempt: 0 for the first camera of the view. A higher number replaces a camera whose image
            was rejected.

    Raises:
        ValueError: If `kind` is not a camera set.
    """
    if kind not in get_args(CameraSet):
        raise ValueError(f"kind must be one of {get_args(CameraSet)}, got {kind!r}")
    generator = np.random.Generator(np.random.PCG64(seed_of(uid, "camera", kind, view, attempt)))
    uniform = generator.random(3)
    if kind == "paper":  # Direct3D-S2 paper (arXiv 2505.17412), section 2
        azimuth = 180 * uniform[0]
        elevation = 10 + 30 * uniform[1]
    else:
        azimuth = 360 * uniform[0]
        elevation = degrees(np.arcsin(2 * uniform[1] - 1))
    focal = FOCAL_MM[0] + (FOCAL_MM[1] - FOCAL_MM[0]) * uniform[2]
    return look_at_origin(*(round(float(value), 9) for value in (azimuth, elevation, focal)))


def project(
    points: NDArray[np.floating], camera: Camera, width: int, height: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Project world points into an image.

    The image spans [0, width] x [0, height], and the centre of the pixel in column i and row j is
    (i + 0.5, j + 0.5). The field of view applies to the height, as in OpenGL.

    Args:
        points: [N, 3] in world coordinates.
        camera: The camera.
        width: Width of the image in pixels.
        height: Height of the image in pixels.

    Returns:
        Pixel coordinates, float64 [N, 2] = (x to the right, y downwards), and the depth in front of
        the eye, float64 [N]. Points with depth <= 0 are behind the camera.
    """
    rotation = camera.c2w[:3, :3]
    eye = camera.c2w[:3, 3]
    local = (np.asarray(points, dtype=np.float64) - eye) @ rotation
    depth = -local[:, 2]
    scale = height / 2 / np.tan(np.radians(camera.fov_degrees) / 2) / depth
    x = width / 2 + local[:, 0] * scale
    y = height / 2 - local[:, 1] * scale
    return np.stack([x, y], axis=1), depth
