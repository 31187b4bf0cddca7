"""Decode the images of a scene to 8-bit sRGB with alpha."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# What Pillow raises on a damaged image.
IMAGE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    TypeError,
    LookupError,
    MemoryError,
    Image.DecompressionBombError,
)


def decode_image(content: bytes, max_side: int) -> NDArray[np.uint8]:
    """Decode an image file.

    Args:
        content: The bytes of the file.
        max_side: Largest side in pixels. Larger images are scaled down.

    Returns:
        uint8 [h, w, 4], sRGB with alpha, row 0 at the top.

    Raises:
        Any of `IMAGE_ERRORS`: If the image cannot be decoded.
    """
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
            # Pillow clips 16-bit values at 255 instead of scaling them.
            values = np.asarray(image, dtype=np.int64)
            depth = 8 if values.max(initial=0) > 255 or image.mode != "I" else 0
            image = Image.fromarray((values >> depth).clip(0, 255).astype(np.uint8))
        return fit_image(np.asarray(image.convert("RGBA"), dtype=np.uint8), max_side)


def fit_image(pixels: NDArray[np.uint8], max_side: int) -> NDArray[np.uint8]:
    """Scale an image [h, w, 4] down so that its longest side is at most `max_side` pixels."""
    side = max(pixels.shape[:2])
    if side <= max_side:
        return pixels
    height, width = (max(1, round(n * max_side / side)) for n in pixels.shape[:2])
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.uint8)
