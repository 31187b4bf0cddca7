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
# A picture in a transparent frame: its least alpha, its longest side to its shortest one, its share
# of the image, the radius of its corners to its shortest side, and how much its colours differ.
OPAQUE_OF_PICTURES = 250
MAX_PICTURE_ASPECT = 4.0
MIN_PICTURE_AREA = 0.1
MAX_FRAMED_RADIUS = 0.25
SAME_COLOR = 8
# A separate piece is a speck if it has less than this share of the largest one's sum of alpha.
MAX_SPECK = 1e-3
# A larger piece is haze if no pixel of it reaches this alpha, that of the largest one is more than
# twice as large, and it has less than this share of the largest one's sum of alpha.
MAX_HAZE_ALPHA = 64
MAX_HAZE = 0.05
EIGHT_NEIGHBOURS = np.ones((3, 3), np.bool_)


def background_is_removed(image: Image.Image) -> bool:
    """Return whether the transparency of an image clearly cuts out an object.

    Some transparent pixels do not: a picture may have a stray one, rounded corners, the shape of a
    disc, a transparent frame around it, or a constant alpha of 254. Where a background was removed,
    most of the picture's border is transparent.

    Args:
        image: RGBA. Alpha below OPAQUE counts as transparent.
    """
    solid = np.asarray(image.getchannel("A")) >= OPAQUE
    if not solid.size:
        return False
    border = np.concatenate([solid[0], solid[-1], solid[:, 0], solid[:, -1]])
    if 1 - border.mean() < MIN_CLEAR_BORDER or 1 - solid.mean() < MIN_CLEAR_AREA:
        return False
    return not _is_rounded_picture(solid) and not _is_framed_picture(image)


def _is_framed_picture(image: Image.Image) -> bool:
    """Return whether what is opaque is a picture in a transparent frame, such as of a window.

    It is a rectangle, also with rounded corners and a shadow, whose pixels differ.
    """
    pixels = np.asarray(image)
    for least in (OPAQUE, OPAQUE_OF_PICTURES):
        solid = pixels[..., 3] >= least
        rows, columns = np.flatnonzero(solid.any(axis=1)), np.flatnonzero(solid.any(axis=0))
        if not len(rows):
            continue
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        inner, colors = solid[box], pixels[box][solid[box]][:, :3]
        shorter, longer = sorted(inner.shape)
        has_shape = longer <= MAX_PICTURE_ASPECT * shorter
        has_size = inner.size >= MIN_PICTURE_AREA * solid.size
        if (
            has_shape
            and has_size
            and np.ptp(colors.astype(int), axis=0).max() > SAME_COLOR
            and _is_rounded_picture(inner, MAX_FRAMED_RADIUS * shorter)
        ):
            return True
    return False


def _is_rounded_picture(solid: NDArray[np.bool_], max_radius: float = math.inf) -> bool:
    """Return whether a mask [h, w] is the whole picture with its corners rounded off.

    Args:
        solid: The mask.
        max_radius: Largest radius of the corners in pixels.
    """
    height, width = solid.shape
    touching = [int(side.sum()) for side in (solid[0], solid[-1], solid[:, 0], solid[:, -1])]
    if not all(touching):
        return False
    across = _corner_radius((width - max(touching[:2])) / 2)
    down = _corner_radius((height - max(touching[2:])) / 2)
    if max(across, down) > max_radius:
        return False
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
    largest = np.zeros(count + 1, np.uint8)
    np.maximum.at(largest, pieces.ravel(), alpha.ravel())
    if largest[weights.argmax()] > 2 * MAX_HAZE_ALPHA:
        is_speck |= (largest < MAX_HAZE_ALPHA) & (weights < MAX_HAZE * weights.max())
    is_speck[0] = False  # what is below OPAQUE stays as it is
    result = image.copy()
    result.putalpha(Image.fromarray(np.where(is_speck[pieces], 0, alpha).astype(np.uint8)))
    return result
