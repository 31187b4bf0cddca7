"""Whether the background of an image was removed, and what a removal left behind."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from model.conditioning.image_preprocessing import OPAQUE

# A removed background takes at least this share of the picture's border and of its area.
MIN_CLEAR_BORDER = 0.5
MIN_CLEAR_AREA = 0.02
# The area of a picture with rounded corners follows from its corners within this share.
ROUNDED_TOLERANCE = 0.01
# A separate piece is a speck if it has less than this share of the largest one's sum of alpha.
MAX_SPECK = 1e-3
EIGHT_NEIGHBOURS = np.ones((3, 3), np.bool_)


def background_is_removed(image: Image.Image) -> bool:
    """Return whether the transparency of an image clearly cuts out an object.

    Some transparent pixels do not: a picture may have a stray one, rounded corners, the shape of a
    disc, or a constant alpha of 254. Where a background was removed, most of the picture's border
    is transparent.

    Args:
        image: RGBA. Alpha below OPAQUE counts as transparent.
    """
    solid = np.asarray(image.getchannel("A")) >= OPAQUE
    if not solid.size:
        return False
    border = np.concatenate([solid[0], solid[-1], solid[:, 0], solid[:, -1]])
    if 1 - border.mean() < MIN_CLEAR_BORDER or 1 - solid.mean() < MIN_CLEAR_AREA:
        return False
    return not _is_rounded_picture(solid)


def _is_rounded_picture(solid: NDArray[np.bool_]) -> bool:
    """Return whether a mask [h, w] is the whole picture with its corners rounded off."""
    height, width = solid.shape
    touching = [int(side.sum()) for side in (solid[0], solid[-1], solid[:, 0], solid[:, -1])]
    if not all(touching):
        return False
    across = _corner_radius((width - max(touching[:2])) / 2)
    down = _corner_radius((height - max(touching[2:])) / 2)
    expected = width * height - (4 - math.pi) * across * down
    return abs(float(solid.sum()) - expected) < ROUNDED_TOLERANCE * width * height


def _corner_radius(open_pixels: float) -> float:
    """Return the radius of a rounded corner that leaves so many pixels of a side open.

    The outermost row of pixels, half a pixel below the side, meets the corner's circle of radius r
    about sqrt(r) before the circle's end: r - sqrt(r) = open_pixels.
    """
    return ((1 + math.sqrt(1 + 4 * open_pixels)) / 2) ** 2 if open_pixels > 0 else 0.0


def without_specks(image: Image.Image) -> Image.Image:
    """Return an image whose faint pieces beside the object are transparent.

    A removal leaves specks of haze. They would count as foreground and make the object small.

    Args:
        image: RGBA.
    """
    alpha = np.asarray(image.getchannel("A"))
    labelled: Any = ndimage.label(alpha >= OPAQUE, EIGHT_NEIGHBOURS)
    pieces, count = labelled
    if count < 2:
        return image
    weights = np.bincount(pieces.ravel(), alpha.ravel(), count + 1)
    weights[0] = 0
    is_speck = weights < MAX_SPECK * weights.max()
    is_speck[0] = False  # what is below OPAQUE stays as it is
    result = image.copy()
    result.putalpha(Image.fromarray(np.where(is_speck[pieces], 0, alpha).astype(np.uint8)))
    return result
