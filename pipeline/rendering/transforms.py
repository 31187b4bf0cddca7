"""The file transforms.json of an asset: its cameras in the conventions of NeRF and instant-ngp."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import degrees
from typing import Any

import numpy as np

from pipeline.core.cameras import Camera, camera_from_matrix, focal_pixels


def transforms_of(cameras: Sequence[Camera], size: int, files: Sequence[str]) -> dict[str, Any]:
    """Return the content of a transforms.json.

    The matrices are camera-to-world with OpenGL axes, as NeRF has them. The world is that of the
    meshes and bricks: y is up and the object lies in [-0.5, 0.5]^3. "scale" and "offset" move it
    into instant-ngp's unit cube.

    Args:
        cameras: The cameras.
        size: Width and height of the images in pixels.
        files: Path of the image of each camera, relative to the transforms.json.
    """
    frames = []
    for camera, file in zip(cameras, files, strict=True):
        focal = focal_pixels(camera, size)
        frame: dict[str, Any] = {
            "file_path": file,
            "transform_matrix": camera.c2w.tolist(),
            "w": size,
            "h": size,
            "fl_x": focal,
            "fl_y": focal,
            "cx": size / 2,
            "cy": size / 2,
        }
        if camera.is_orthographic:
            frame |= {"camera_model": "ORTHOPHOTO", "ortho_scale": camera.ortho_scale}
        else:
            angle = float(np.radians(camera.fov_degrees))
            frame |= {"camera_angle_x": angle, "camera_angle_y": angle}
        frames.append(frame)
    shared = {"w": size, "h": size, "aabb_scale": 1, "scale": 1.0, "offset": [0.5, 0.5, 0.5]}
    angles = {frame.get("camera_angle_x") for frame in frames}
    if len(angles) == 1 and None not in angles:
        shared["camera_angle_x"] = angles.pop()
    return {**shared, "frames": frames}


def camera_of_frame(frame: dict[str, Any], number: int = 0) -> Camera:
    """Return the camera of a frame of `transforms_of`.

    Raises:
        KeyError: If the frame lacks a number.
        ValueError: If the frame describes no camera.
    """
    if frame.get("camera_model") == "ORTHOPHOTO":
        lens = {"ortho_scale": frame["h"] / frame["fl_y"]}
    else:
        lens = {"fov_degrees": 2 * degrees(float(np.arctan(frame["h"] / 2 / frame["fl_y"])))}
    return camera_from_matrix(np.array(frame["transform_matrix"]), number=number, **lens)


def dump_transforms(content: dict[str, Any]) -> bytes:
    """Return the bytes of a transforms.json. Equal contents give equal bytes."""
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
