"""Meshes compared by how they look to DINOv2: normal maps as a set, and a render beside the image it came from."""

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

SIZE = 224  # pixels of what the network sees; its patches divide it
ELEVATION_DEGREES, FOCAL_MM, SIDES = 20.0, 50.0, 8  # of the cameras of normal maps, all around


class DinoFeatures:
    """The class token of DINOv2 after its last norm, of images of SIZE pixels."""

    def __init__(self, encoder: DinoEncoder, device: torch.device):
        self.encoder = encoder.to(device)
        self.device = device

    @classmethod
    def load(cls, weights: str, device: torch.device) -> DinoFeatures:
        """Weights from a folder or the hub, as `DinoEncoder.load`, in fp32. UserError if they are nowhere."""
        return cls(DinoEncoder.load(weights, image_size=SIZE, dtype=torch.float32), device)

    @torch.no_grad()
    def __call__(self, images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float64]:
        """RGB [SIZE, SIZE, 3] each -> [n, C]. ValueError for another shape or no image."""
        shapes = {image.shape for image in images}
        if shapes != {(SIZE, SIZE, 3)}:
            raise ValueError(f"images must be RGB [{SIZE}, {SIZE}, 3], got {sorted(shapes)}")
        found = [
            self._of(torch.from_numpy(np.stack(images[n : n + 32])))
            for n in range(0, len(images), 32)
        ]
        return torch.cat(found).double().cpu().numpy()

    def _of(self, pixels_BHWC: Tensor) -> Tensor:
        model: Any = self.encoder.model
        pixels_BCHW = pixels_BHWC.to(self.device).permute(0, 3, 1, 2).float() / 255
        return model((pixels_BCHW - self.encoder.mean) / self.encoder.std).pooler_output

    def similarity(self, a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
        """Cosine of two RGBA images [h, w, 4], each cropped to its foreground on white; 0 if one shows nothing."""
        try:
            shown = [prepare_image(image, SIZE, whole_if_opaque=True).rgb for image in (a, b)]
        except ValueError:  # no foreground
            return 0.0
        x, y = self(shown)
        return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def frechet_distance(a_NC: NDArray[np.floating], b_MC: NDArray[np.floating]) -> float:
    """Squared distance of the two normal distributions with the sets' means and covariances (Frechet 1957; FID).

    |mean - mean'|^2 + tr(S + S' - 2 (S S')^(1/2)). The last trace is the sum of the singular values of A B^T, A and B
    the centred sets over sqrt(n - 1): exact also where there are fewer samples than channels. ValueError for sets of
    other widths or below two samples.
    """
    a, b = np.asarray(a_NC, np.float64), np.asarray(b_MC, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"a_NC and b_MC must be [2 or more, C] of one C, got {a.shape} and {b.shape}"
        )
    mean, other = a.mean(0), b.mean(0)
    a, b = (a - mean) / (len(a) - 1) ** 0.5, (b - other) / (len(b) - 1) ** 0.5
    both = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(max(((mean - other) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * both, 0.0))


def normal_maps(
    vertices: NDArray[np.floating], faces: NDArray[np.integer]
) -> list[NDArray[np.uint8]]:
    """RGB [SIZE, SIZE, 3] from SIDES cameras around a mesh in the cube [-0.5, 0.5]^3; white if it is empty."""
    eyes = [look_at_origin(360 * n / SIDES, ELEVATION_DEGREES, FOCAL_MM) for n in range(SIDES)]
    return [normal_map(vertices, faces, eye, SIZE) for eye in eyes]


def normal_map(
    vertices: NDArray[np.floating], faces: NDArray[np.integer], eye: Camera, size: int
) -> NDArray[np.uint8]:
    """RGB [size, size, 3]: the unit normal n of each pixel's nearest face as 127.5 (n + 1); white around.

    In the camera's axes: right, up, towards the eye. A face seen from behind shows the normal of its other side.
    """
    image = np.full((size, size, 3), 255, np.uint8)
    if not len(faces):
        return image
    there = (np.asarray(vertices, np.float64) - eye.c2w[:3, 3]) @ eye.c2w[:3, :3]
    scale = size / (2 * np.tan(np.radians(eye.fov_degrees) / 2))
    _draw_normals(there, np.ascontiguousarray(faces, np.int64), scale, image)
    return image


@njit(cache=True)
def _draw_normals(vertices, faces, scale, image):
    """Every triangle's pixel centres, the nearest kept. Vertices in the camera's frame, all before it (z < 0)."""
    size = len(image)
    nearest = np.zeros((size, size))  # 1 / depth, which is linear in the image
    for f in range(len(faces)):
        a, b, c = vertices[faces[f, 0]], vertices[faces[f, 1]], vertices[faces[f, 2]]
        ux, uy, uz = b[0] - a[0], b[1] - a[1], b[2] - a[2]
        vx, vy, vz = c[0] - a[0], c[1] - a[1], c[2] - a[2]
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        length = np.sqrt(nx * nx + ny * ny + nz * nz)
        ia, ib, ic = -1 / a[2], -1 / b[2], -1 / c[2]
        xa, ya = size / 2 + scale * a[0] * ia, size / 2 - scale * a[1] * ia
        xb, yb = size / 2 + scale * b[0] * ib, size / 2 - scale * b[1] * ib
        xc, yc = size / 2 + scale * c[0] * ic, size / 2 - scale * c[1] * ic
        area = (xb - xa) * (yc - ya) - (xc - xa) * (yb - ya)
        if length == 0 or area == 0:
            continue
        if nx * a[0] + ny * a[1] + nz * a[2] > 0:  # it faces away
            length = -length
        low_x, high_x = (
            max(int(np.floor(min(xa, xb, xc))), 0),
            min(int(np.ceil(max(xa, xb, xc))), size),
        )
        low_y, high_y = (
            max(int(np.floor(min(ya, yb, yc))), 0),
            min(int(np.ceil(max(ya, yb, yc))), size),
        )
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
