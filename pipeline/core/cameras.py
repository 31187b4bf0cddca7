"""Cameras: sampling from a camera set, reading from a file, and projection."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import atan, cos, degrees, radians, sin
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.core.hashing import seed_of
from pipeline.core.options import CameraSet

SENSOR_MM = 36.0  # side of the square sensor
RADIUS = 0.866  # radius of the sphere that fits the image: half the diagonal of the unit cube
ORTHO_DISTANCE = 2.0  # of orthographic cameras, which only decides what is in front of them
AXES = ((0.0, 0.0), (90.0, 0.0), (180.0, 0.0), (270.0, 0.0), (0.0, 90.0), (0.0, -90.0))
FOCAL_MM = (30.0, 100.0)  # Direct3D-S2 paper (arXiv 2505.17412), section 2


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A camera with square pixels and a square image.

    The cameras of a set look at the origin, and world y is up in their images. The cameras of a
    file may look anywhere.

    Attributes:
        azimuth_degrees: Angle of the eye around the y axis. At 0 the eye is on +z (the front of the
            object), at 90 on +x.
        elevation_degrees: Angle of the eye above the horizontal plane.
        focal_mm: Focal length for a square sensor of 36 mm. 0 for an orthographic camera.
        distance: Distance of the eye from the origin, in units of the cube's side.
        fov_degrees: Field of view of the whole image, the same horizontally and vertically. 0 for
            an orthographic camera.
        c2w: float64 [4, 4], camera-to-world matrix with OpenGL axes. Its columns are right, up,
            backwards and the eye.
        ortho_scale: Width and height of what an orthographic camera sees, in units of the cube's
            side. 0 for a pinhole camera.
        in_file: Number of the camera in its file, None for a sampled camera.
    """

    azimuth_degrees: float
    elevation_degrees: float
    focal_mm: float
    distance: float
    fov_degrees: float
    c2w: NDArray[np.float64]
    ortho_scale: float = 0.0
    in_file: int | None = None

    @property
    def is_orthographic(self) -> bool:
        """Whether parallel rays make the image."""
        return self.ortho_scale > 0

    def meta(self) -> dict[str, Any]:
        """Return what the json of a view says about its camera."""
        numbers: dict[str, Any] = {
            "c2w": self.c2w.tolist(),
            "fov_degrees": self.fov_degrees,
            "focal_mm": self.focal_mm,
            "sensor_mm": SENSOR_MM,
            "azimuth_degrees": self.azimuth_degrees,
            "elevation_degrees": self.elevation_degrees,
            "distance": self.distance,
        }
        if self.is_orthographic:
            numbers |= {"projection": "orthographic", "ortho_scale": self.ortho_scale}
        if self.in_file is not None:
            numbers["camera_in_file"] = self.in_file
        return numbers


def look_at_origin(azimuth_degrees: float, elevation_degrees: float, focal_mm: float) -> Camera:
    """Return the camera at a direction, so far away that the sphere of radius 0.866 fits its image.

    Args:
        azimuth_degrees: See `Camera`.
        elevation_degrees: See `Camera`.
        focal_mm: See `Camera`.
    """
    fov = 2 * atan(SENSOR_MM / 2 / focal_mm)
    distance = RADIUS / sin(fov / 2)
    return Camera(
        azimuth_degrees=azimuth_degrees,
        elevation_degrees=elevation_degrees,
        focal_mm=focal_mm,
        # Rounded, because the last bit of a sine differs between platforms and must not change the
        # bytes of a build.
        distance=round(distance, 12),
        fov_degrees=round(degrees(fov), 12),
        c2w=_looking_at_origin(azimuth_degrees, elevation_degrees, distance),
    )


def orthographic_camera(azimuth_degrees: float, elevation_degrees: float) -> Camera:
    """Return the orthographic camera at a direction whose image the sphere of radius 0.866 fits.

    Args:
        azimuth_degrees: See `Camera`.
        elevation_degrees: See `Camera`.
    """
    return Camera(
        azimuth_degrees=azimuth_degrees,
        elevation_degrees=elevation_degrees,
        focal_mm=0.0,
        distance=ORTHO_DISTANCE,
        fov_degrees=0.0,
        c2w=_looking_at_origin(azimuth_degrees, elevation_degrees, ORTHO_DISTANCE),
        ortho_scale=2 * RADIUS,
    )


def _looking_at_origin(
    azimuth_degrees: float, elevation_degrees: float, distance: float
) -> NDArray[np.float64]:
    """Return the camera-to-world matrix of an eye at a direction and a distance."""
    azimuth = radians(azimuth_degrees)
    elevation = radians(elevation_degrees)
    right = np.array([cos(azimuth), 0.0, -sin(azimuth)])
    backwards = np.array(
        [cos(elevation) * sin(azimuth), sin(elevation), cos(elevation) * cos(azimuth)]
    )
    c2w = np.eye(4)
    c2w[:3] = np.stack([right, np.cross(backwards, right), backwards, distance * backwards], axis=1)
    return c2w.round(12) + 0.0


def sample_camera(uid: str, view: int, kind: CameraSet = "paper", attempt: int = 0) -> Camera:
    """Sample the camera of a view. The result depends on the arguments alone.

    Args:
        uid: The asset.
        view: Number of the view.
        kind: The camera set. "paper" has azimuths uniform in 0..180 degrees, elevations in 10..40
            degrees and focal lengths in 30..100 mm. "wide" has the same focal lengths and
            directions that are uniform on the sphere. "orthographic" looks along the axes in views
            0 to 5, from the front, the right, the back, the left, above and below, and has
            directions that are uniform on the sphere in other views and attempts.
        attempt: 0 for the first camera of the view. A higher number replaces a camera whose image
            was rejected.

    Raises:
        ValueError: If `kind` is not a camera set.
    """
    if kind not in get_args(CameraSet):
        raise ValueError(f"kind must be one of {get_args(CameraSet)}, got {kind!r}")
    generator = np.random.Generator(np.random.PCG64(seed_of(uid, "camera", kind, view, attempt)))
    uniform = generator.random(3)
    if kind == "orthographic" and attempt == 0 and view < len(AXES):
        return orthographic_camera(*AXES[view])
    if kind == "paper":  # Direct3D-S2 paper (arXiv 2505.17412), section 2
        azimuth = 180 * uniform[0]
        elevation = 10 + 30 * uniform[1]
    else:
        azimuth = 360 * uniform[0]
        elevation = degrees(np.arcsin(2 * uniform[1] - 1))
    if kind == "orthographic":
        return orthographic_camera(round(float(azimuth), 9), round(float(elevation), 9))
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
    scale = focal_pixels(camera, height) / (1.0 if camera.is_orthographic else depth)
    x = width / 2 + local[:, 0] * scale
    y = height / 2 - local[:, 1] * scale
    return np.stack([x, y], axis=1), depth


def focal_pixels(camera: Camera, height: int) -> float:
    """Return the focal length in pixels, or the pixels of a unit for an orthographic camera."""
    if camera.is_orthographic:
        return height / camera.ortho_scale
    return height / 2 / float(np.tan(np.radians(camera.fov_degrees) / 2))


def unproject(
    depth: NDArray[np.floating], camera: Camera
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the world points of a depth image.

    Args:
        depth: [size, size], distance along the camera's axis, 0 where there is nothing.
        camera: The camera.

    Returns:
        points: float64 [size, size, 3], for the pixel centres.
        known: bool [size, size], where there is something.
    """
    size = len(depth)
    offset = (np.arange(size) + 0.5 - size / 2) / focal_pixels(camera, size)
    x, y = np.meshgrid(offset, -offset)
    depth = np.asarray(depth, np.float64)
    scale = np.ones_like(depth) if camera.is_orthographic else depth
    local = np.stack([x * scale, y * scale, -depth], axis=-1)
    return local @ camera.c2w[:3, :3].T + camera.c2w[:3, 3], depth > 0


def camera_from_matrix(
    c2w: NDArray[np.floating], *, fov_degrees: float = 0.0, ortho_scale: float = 0.0, number: int
) -> Camera:
    """Return a camera that is given by its matrix.

    Args:
        c2w: [4, 4], a rotation and a position, see `Camera`.
        fov_degrees: Field of view of a pinhole camera.
        ortho_scale: See `Camera`.
        number: Number of the camera in its file.

    Raises:
        ValueError: If the matrix is no rotation and position, or the camera has not exactly one of
            `fov_degrees` and `ortho_scale`.
    """
    matrix = np.asarray(c2w, np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        raise ValueError(f"camera {number}: c2w must be a 4 x 4 matrix of numbers")
    rotation, eye = matrix[:3, :3], matrix[:3, 3]
    is_rotation = np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-4)
    if not is_rotation or np.linalg.det(rotation) < 0 or (matrix[3] != [0, 0, 0, 1]).any():
        raise ValueError(
            f"camera {number}: c2w must be a rotation and a position with the last row 0 0 0 1"
        )
    if (fov_degrees > 0) == (ortho_scale > 0) or not 0 <= fov_degrees < 180:
        raise ValueError(
            f"camera {number}: one of fov_degrees, between 0 and 180, and ortho_scale must be "
            f"positive, got {fov_degrees} and {ortho_scale}"
        )
    distance = float(np.linalg.norm(eye))
    upwards = float(np.clip(eye[1] / distance, -1, 1)) if distance else 0.0
    focal = SENSOR_MM / 2 / np.tan(np.radians(fov_degrees) / 2) if fov_degrees else 0.0
    return Camera(
        azimuth_degrees=round(degrees(float(np.arctan2(eye[0], eye[2]))) % 360, 9),
        elevation_degrees=round(degrees(float(np.arcsin(upwards))), 9),
        focal_mm=round(float(focal), 9),
        distance=round(distance, 12),
        fov_degrees=round(float(fov_degrees), 12),
        c2w=matrix.round(12) + 0.0,
        ortho_scale=round(float(ortho_scale), 12),
        in_file=number,
    )


def read_cameras(content: str) -> tuple[Camera, ...]:
    """Read the cameras of a file.

    The file is a JSON object. Either "cameras" lists objects, each with "azimuth_degrees" and
    "elevation_degrees" (a camera of `look_at_origin` with "focal_mm", or of `orthographic_camera`
    with "projection": "orthographic") or with "c2w" and one of "fov_degrees" and "ortho_scale". Or
    it is a transforms.json, whose "frames" have "transform_matrix", and an angle "camera_angle_x"
    that each frame or the file states.

    Raises:
        ValueError: If the content is something else.
    """
    try:
        data = json.loads(content)
        if "frames" in data:
            return tuple(
                camera_from_matrix(
                    np.array(frame["transform_matrix"], np.float64),
                    fov_degrees=degrees(float(frame.get("camera_angle_x", angle))),
                    number=number,
                )
                for angle in [data.get("camera_angle_x", 0.0)]
                for number, frame in enumerate(data["frames"])
            )
        cameras = tuple(
            normal_form(camera_of(item, number)) for number, item in enumerate(data["cameras"])
        )
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"it has no readable cameras ({type(error).__name__}: {error})") from error
    if not cameras:
        raise ValueError("it has no cameras")
    return cameras


def camera_of(item: dict[str, Any], number: int) -> Camera:
    """Return the camera that an entry of a camera file describes, see `read_cameras`.

    Raises:
        KeyError: If the entry lacks a number.
        ValueError: If it describes no camera.
    """
    if "c2w" in item:
        return camera_from_matrix(
            np.array(item["c2w"], np.float64),
            fov_degrees=float(item.get("fov_degrees", 0)),
            ortho_scale=float(item.get("ortho_scale", 0)),
            number=number,
        )
    angles = float(item["azimuth_degrees"]), float(item["elevation_degrees"])
    if item.get("projection") == "orthographic":
        return replace(orthographic_camera(*angles), in_file=number)
    focal = float(item["focal_mm"])
    if not focal > 0:
        raise ValueError(f"camera {number}: focal_mm must be positive, got {focal}")
    return replace(look_at_origin(*angles, focal), in_file=number)


def normal_form(camera: Camera) -> Camera:
    """Return the camera of a file as `camera_from_matrix` describes it."""
    return camera_from_matrix(
        camera.c2w,
        fov_degrees=camera.fov_degrees,
        ortho_scale=camera.ortho_scale,
        number=camera.in_file or 0,
    )


def text_of_camera(camera: Camera) -> str:
    """Return the JSON text from which `camera_of` makes the camera of a file again."""
    lens = "ortho_scale" if camera.is_orthographic else "fov_degrees"
    return json.dumps({"c2w": camera.c2w.tolist(), lens: getattr(camera, lens)})


def camera_of_meta(meta: Mapping[str, Any]) -> Camera:
    """Return the camera that the json of a view states.

    Raises:
        KeyError: If a number is missing.
        ValueError: If it states no camera.
    """
    if "camera_in_file" in meta:
        return camera_from_matrix(
            np.array(meta["c2w"]),
            fov_degrees=meta["fov_degrees"],
            ortho_scale=meta.get("ortho_scale", 0.0),
            number=meta["camera_in_file"],
        )
    angles = meta["azimuth_degrees"], meta["elevation_degrees"]
    if meta.get("projection") == "orthographic":
        return orthographic_camera(*angles)
    return look_at_origin(*angles, meta["focal_mm"])
