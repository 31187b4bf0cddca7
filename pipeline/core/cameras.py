"""Where a view is taken from: seeded pinhole cameras that look at the origin, and projection into their images."""

from __future__ import annotations

from dataclasses import dataclass
from math import atan, cos, degrees, radians, sin
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.core.hashing import seed_of
from pipeline.core.options import CameraSet

SENSOR_MM = 36.0  # side of the square sensor
RADIUS = 0.866  # of the sphere that just fits the image: half the diagonal of the unit cube
FOCAL_MM = (30.0, 100.0)  # paper, sec. 2 (data)


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole camera with square pixels, looking at the origin, its image's up in the plane of world y.

    Azimuth 0 sees the front (eye on +z), 90 has its eye on +x; elevation counts up from the horizon.
    """

    azimuth_degrees: float
    elevation_degrees: float
    focal_mm: float
    distance: float  # of the eye from the origin, cube units
    fov_degrees: float  # of the whole image, horizontally and vertically
    c2w: NDArray[np.float64]  # [4, 4], OpenGL: columns right, up, backwards, eye

    def meta(self) -> dict[str, Any]:
        """The camera's share of a view's json."""
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
    """The camera on that side of the object, as far away as the sphere of radius 0.866 needs to fit its image."""
    fov = 2 * atan(SENSOR_MM / 2 / focal_mm)
    distance = RADIUS / sin(fov / 2)
    a, e = radians(azimuth_degrees), radians(elevation_degrees)
    right = np.array([cos(a), 0.0, -sin(a)])
    back = np.array([cos(e) * sin(a), sin(e), cos(e) * cos(a)])
    c2w = np.eye(4)
    c2w[:3] = np.stack([right, np.cross(back, right), back, distance * back], axis=1)
    return Camera(
        azimuth_degrees=azimuth_degrees,
        elevation_degrees=elevation_degrees,
        focal_mm=focal_mm,
        # Rounded, so that the last bit of a platform's sine does not change the bytes of a build.
        distance=round(distance, 12),
        fov_degrees=round(degrees(fov), 12),
        c2w=c2w.round(12) + 0.0,
    )


def sample_camera(uid: str, view: int, kind: CameraSet = "paper", attempt: int = 0) -> Camera:
    """The camera of a view; it depends on these arguments alone. `attempt` > 0 replaces a view that came out bad.

    paper: azimuth uniform in 0..180, elevation in 10..40 degrees, focal length in 30..100 mm.
    wide: the eye's direction uniform on the sphere, the same focal lengths. ValueError for another kind.
    """
    if kind not in get_args(CameraSet):
        raise ValueError(f"kind must be one of {get_args(CameraSet)}, got {kind!r}")
    u = np.random.Generator(np.random.PCG64(seed_of(uid, "camera", kind, view, attempt))).random(3)
    if kind == "paper":  # paper, sec. 2 (data)
        azimuth, elevation = 180 * u[0], 10 + 30 * u[1]
    else:
        azimuth, elevation = 360 * u[0], degrees(np.arcsin(2 * u[1] - 1))
    focal = FOCAL_MM[0] + (FOCAL_MM[1] - FOCAL_MM[0]) * u[2]
    return look_at_origin(*(round(float(value), 9) for value in (azimuth, elevation, focal)))


def project(
    points: NDArray[np.floating], camera: Camera, width: int, height: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """World points [N, 3] -> pixel coordinates [N, 2] = (x right, y down) and depth [N] in front of the eye.

    The image spans [0, width] x [0, height]; the centre of pixel (column, row) is (column + 0.5, row + 0.5).
    The field of view is that of the height, as OpenGL has it. Points at depth <= 0 are behind the camera.
    """
    rotation, eye = camera.c2w[:3, :3], camera.c2w[:3, 3]
    local = (np.asarray(points, dtype=np.float64) - eye) @ rotation
    depth = -local[:, 2]
    scale = height / 2 / np.tan(np.radians(camera.fov_degrees) / 2) / depth
    x, y = width / 2 + local[:, 0] * scale, height / 2 - local[:, 1] * scale
    return np.stack([x, y], axis=1), depth
