"""Metrics of how meshes look: normal maps, Frechet distance, and DINOv2 similarity of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from model.conditioning.image_encoder import DinoEncoder
from model.conditioning.image_preprocessing import prepare_image
from pipeline.core.cameras import Camera, look_at_origin

SIZE = 224  # side of the images that the network sees, in pixels; its patches divide it
BATCH = 32  # images that the network sees at once
NORMAL_MAPS = 8  # per mesh, from cameras at even angles around it
ELEVATION_DEGREES = 20.0  # of these cameras
FOCAL_MM = 50.0


class DinoFeatures:
    """The class token of DINOv2 after its last normalisation.

    Args:
        encoder: DINOv2 for images of SIZE pixels.
        device: Where it runs.
    """

    def __init__(self, encoder: DinoEncoder, device: torch.device):
        self.encoder = encoder.to(device)
        self.device = device

    @classmethod
    def load(cls, weights: str, device: torch.device) -> DinoFeatures:
        """Load DINOv2 in fp32.

        Args:
            weights: A folder or a name on the Hugging Face hub.
            device: Where it runs.

        Raises:
            UserError: If the weights are not found.
        """
        return cls(DinoEncoder.load(weights, image_size=SIZE, dtype=torch.float32), device)

    @torch.no_grad()
    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float64]:
        """Return the features of images.

        Args:
            images: RGB, uint8 [SIZE, SIZE, 3] each, at least one.

        Returns:
            [number of images, C].

        Raises:
            ValueError: If an image has another shape, or there is none.
        """
        shapes = {image.shape for image in images}
        if shapes != {(SIZE, SIZE, 3)}:
            raise ValueError(f"images must be RGB [{SIZE}, {SIZE}, 3], got {sorted(shapes)}")
        features = [
            self._forward(torch.from_numpy(np.stack(images[first : first + BATCH])))
            for first in range(0, len(images), BATCH)
        ]
        return torch.cat(features).double().cpu().numpy()

    def _forward(self, pixels_BHWC: Tensor) -> Tensor:
        model: Any = self.encoder.model
        pixels_BCHW = pixels_BHWC.to(self.device).permute(0, 3, 1, 2).float() / 255
        return model((pixels_BCHW - self.encoder.mean) / self.encoder.std).pooler_output

    def similarity(self, a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
        """Return the cosine between the features of two images, cropped to their foregrounds.

        Args:
            a: RGBA, uint8 [H, W, 4].
            b: RGBA, uint8 [H, W, 4].

        Returns:
            The cosine, or 0 if an image has no foreground.
        """
        try:
            cropped = [prepare_image(image, SIZE, whole_if_opaque=True).rgb for image in (a, b)]
        except ValueError:  # no foreground
            return 0.0
        x, y = self(cropped)
        return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def frechet_distance(a_NC: NDArray[np.floating], b_MC: NDArray[np.floating]) -> float:
    """Return the squared Frechet distance between two normal distributions (Frechet 1957).

    They have the means and covariances S and S' of the two sets. The distance, which is the formula
    of the FID, is |mean - mean'|^2 + tr(S + S' - 2 (S S')^(1/2)). The trace of the square root is
    the sum of the singular values of A B^T, where A and B are the centred sets divided by
    sqrt(n - 1). This is exact for sets with fewer samples than channels, too.

    Args:
        a_NC: [N, C].
        b_MC: [M, C].

    Raises:
        ValueError: If the sets have different widths, or one has fewer than two samples.
    """
    a, b = np.asarray(a_NC, np.float64), np.asarray(b_MC, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"a_NC and b_MC must be [2 or more, C] of one C, got {a.shape} and {b.shape}"
        )
    mean_a, mean_b = a.mean(0), b.mean(0)
    a = (a - mean_a) / (len(a) - 1) ** 0.5
    b = (b - mean_b) / (len(b) - 1) ** 0.5
    trace_of_root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    squared = ((mean_a - mean_b) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * trace_of_root
    return float(max(squared, 0.0))


def normal_maps(
    vertices: NDArray[np.floating], faces: NDArray[np.integer]
) -> list[NDArray[np.uint8]]:
    """Draw normal maps of a mesh from NORMAL_MAPS cameras around it.

    Args:
        vertices: [V, 3] in the cube [-0.5, 0.5]^3.
        faces: [F, 3].

    Returns:
        One image of `normal_map` with SIZE pixels per camera.
    """
    cameras = [
        look_at_origin(360 * n / NORMAL_MAPS, ELEVATION_DEGREES, FOCAL_MM)
        for n in range(NORMAL_MAPS)
    ]
    return [normal_map(vertices, faces, camera, SIZE) for camera in cameras]


def normal_map(
    vertices: NDArray[np.floating], faces: NDArray[np.integer], camera: Camera, size: int
) -> NDArray[np.uint8]:
    """Draw the normals of a mesh.

    Args:
        vertices: [V, 3] in the cube [-0.5, 0.5]^3.
        faces: [F, 3].
        camera: Where the mesh is seen from.
        size: Pixels per side.

    Returns:
        RGB, uint8 [size, size, 3]: the unit normal n of the nearest face at each pixel, encoded as
        127.5 (n + 1), in the axes right, up and towards the camera. A face that is seen from behind
        has the opposite normal. Pixels without a face are white.
    """
    image = np.full((size, size, 3), 255, np.uint8)
    if not len(faces):
        return image
    in_camera = (np.asarray(vertices, np.float64) - camera.c2w[:3, 3]) @ camera.c2w[:3, :3]
    scale = size / (2 * np.tan(np.radians(camera.fov_degrees) / 2))
    _draw_normals(in_camera, np.ascontiguousarray(faces, np.int64), scale, image)
    return image


@njit(cache=True)
def _draw_normals(vertices, faces, scale, image):
    """Rasterize triangles with a depth buffer.

    `vertices` are in the camera's frame, in front of it (z < 0). `image` is overwritten.
    """
    size = len(image)
    nearest = np.zeros((size, size))  # inverse depth, which is linear in the image
    for f in range(len(faces)):
        a, b, c = vertices[faces[f, 0]], vertices[faces[f, 1]], vertices[faces[f, 2]]
        # The normal: cross product of two edges.
        ux, uy, uz = b[0] - a[0], b[1] - a[1], b[2] - a[2]
        vx, vy, vz = c[0] - a[0], c[1] - a[1], c[2] - a[2]
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        length = np.sqrt(nx * nx + ny * ny + nz * nz)
        # Inverse depths and pixel coordinates of the corners, and the signed area in the image.
        ia, ib, ic = -1 / a[2], -1 / b[2], -1 / c[2]
        xa, ya = size / 2 + scale * a[0] * ia, size / 2 - scale * a[1] * ia
        xb, yb = size / 2 + scale * b[0] * ib, size / 2 - scale * b[1] * ib
        xc, yc = size / 2 + scale * c[0] * ic, size / 2 - scale * c[1] * ic
        area = (xb - xa) * (yc - ya) - (xc - xa) * (yb - ya)
        if length == 0 or area == 0:
            continue
        if nx * a[0] + ny * a[1] + nz * a[2] > 0:  # the face is seen from behind
            length = -length
        # The pixels of the bounding box whose centre lies in the triangle.
        low_x = max(int(np.floor(min(xa, xb, xc))), 0)
        high_x = min(int(np.ceil(max(xa, xb, xc))), size)
        low_y = max(int(np.floor(min(ya, yb, yc))), 0)
        high_y = min(int(np.ceil(max(ya, yb, yc))), size)
        for row in range(low_y, high_y):
            for column in range(low_x, high_x):
                x, y = column + 0.5 - xa, row + 0.5 - ya
                wb = (x * (yc - ya) - (xc - xa) * y) / area
                wc = ((xb - xa) * y - x * (yb - ya)) / area
                if wb < 0 or wc < 0 or wb + wc > 1:
                    continue
                near = ia + wb * (ib - ia) + wc * (ic - ia)
                if near > nearest[row, column]:
                    nearest[row, column] = near
                    image[row, column, 0] = np.uint8(np.rint(127.5 * (nx / length + 1)))
                    image[row, column, 1] = np.uint8(np.rint(127.5 * (ny / length + 1)))
                    image[row, column, 2] = np.uint8(np.rint(127.5 * (nz / length + 1)))
