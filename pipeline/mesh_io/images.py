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


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_DEPTH_BYTE = 24  # in the header chunk, which is the first
KTX2_SIGNATURE = b"\xabKTX 20\xbb\r\n\x1a\n"
FAINT_ALPHA = 16  # of 255, below which colours weighted by alpha have few bits
MODES_16_BITS = ("I;16", "I;16B", "I;16L", "I;16N")


def decode_image(content: bytes, max_side: int) -> NDArray[np.uint8]:
    """Decode an image file: what Pillow reads, and KTX2 with a Basis Universal payload.

    Args:
        content: The bytes of the file.
        max_side: Largest side in pixels. Larger images are scaled down.

    Returns:
        uint8 [h, w, 4], sRGB with alpha, row 0 at the top.

    Raises:
        Any of `IMAGE_ERRORS`: If the image cannot be decoded.
    """
    if content.startswith(KTX2_SIGNATURE):
        return fit_image(_decode_ktx2(content, max_side), max_side)
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        if image.mode in (*MODES_16_BITS, "I"):
            return fit_image(_from_wide_grey(image), max_side)
        if image.mode == "F":
            return fit_image(_from_float_grey(image), max_side)
        _scale_transparent_color(image, content)
        if image.mode == "CMYK":
            image = image.convert("RGB")
        return fit_image(np.asarray(image.convert("RGBA"), dtype=np.uint8), max_side)


def _from_wide_grey(image: Image.Image) -> NDArray[np.uint8]:
    """Convert a grey image of 16 or 32 bits to RGBA. Pillow would clip its values at 255."""
    values = np.asarray(image, dtype=np.int64)
    alpha = np.full(values.shape, 255, dtype=np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        alpha[values == transparent] = 0
    # Files of 32 bits usually hold values of 16 bits or of 8 bits.
    top = 255 if image.mode == "I" and values.max(initial=0) <= 255 else 65535
    grey = np.rint(values.clip(0, top) * (255 / top)).astype(np.uint8)
    return np.stack([grey, grey, grey, alpha], axis=2)


def _from_float_grey(image: Image.Image) -> NDArray[np.uint8]:
    """Convert a grey image of floats to RGBA. Pillow would take them as values up to 255.

    Values of which none is above 1 are shares of 1.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    largest = values.max(initial=0)
    top = next((limit for limit in (1, 255, 65535) if largest <= limit), largest)
    grey = np.rint(values.clip(0, top) * (255 / top)).astype(np.uint8)
    return np.stack([grey, grey, grey, np.full_like(grey, 255)], axis=2)


def _scale_transparent_color(image: Image.Image, content: bytes) -> None:
    """Scale the transparent colour of a PNG file to the 8 bits to which Pillow scales its pixels.

    Of a colour of 16 bits the high bytes count, because Pillow keeps only those of the pixels.
    """
    transparent = image.info.get("transparency")
    if not content.startswith(PNG_SIGNATURE) or isinstance(transparent, bytes):
        return
    depth = content[PNG_DEPTH_BYTE]
    if image.mode == "L" and depth < 8 and isinstance(transparent, int):
        image.info["transparency"] = transparent * 255 // (2**depth - 1)
    elif image.mode == "RGB" and depth == 16 and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)


def _decode_ktx2(content: bytes, max_side: int) -> NDArray[np.uint8]:
    """Decode the largest level of a KTX2 file that is not larger than `max_side`.

    Raises:
        ValueError: If the file has no level, or one with too many pixels.
    """
    import opengl_basisu

    texture = opengl_basisu.open(content)
    sizes = [texture.level_size(level) for level in range(texture.levels)]
    fitting = [level for level, size in enumerate(sizes) if max(size) <= max_side]
    level = fitting[0] if fitting else len(sizes) - 1
    width, height = sizes[level]
    if width * height > 2 * (Image.MAX_IMAGE_PIXELS or 0):
        raise ValueError(f"an image of {width} x {height} pixels is too large")
    return np.ascontiguousarray(texture.transcode("rgba8", level=level).data, dtype=np.uint8)


def fit_image(pixels: NDArray[np.uint8], max_side: int) -> NDArray[np.uint8]:
    """Scale an image [h, w, 4] down so that its longest side is at most `max_side` pixels."""
    side = max(pixels.shape[:2])
    if side <= max_side:
        return pixels
    height, width = (max(1, round(n * max_side / side)) for n in pixels.shape[:2])
    size = (width, height)
    result = np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BOX), dtype=np.uint8)
    # The colours are weighted by alpha. Where it is small they are lost, though a material without
    # alpha or a map of normals may show them.
    is_faint = result[..., 3] < FAINT_ALPHA
    if is_faint.any():
        colors = Image.fromarray(np.ascontiguousarray(pixels[..., :3]))
        plain = np.asarray(colors.resize(size, Image.Resampling.BOX), dtype=np.uint8)
        result[is_faint, :3] = plain[is_faint]
    return result
