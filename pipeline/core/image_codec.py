"""Lossless image files of views: PNG, WebP and OpenEXR."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.options import ImageFormat
from pipeline.core.schema import View


def encode(view: View, format: ImageFormat = "png") -> bytes:
    """Encode the image of a view without loss. Equal pixels give equal bytes.

    Raises:
        ValueError: If `format` is neither "png" nor "webp".
    """
    image, file = Image.fromarray(view.rgba), BytesIO()
    if format == "png":
        image.save(file, "PNG", compress_type=zlib.Z_RLE)  # as small as level 4 in half the time
    elif format == "webp":
        image.save(file, "WEBP", lossless=True, quality=0, method=1, exact=True)
    else:
        raise ValueError(f"format must be one of {get_args(ImageFormat)}, got {format!r}")
    return file.getvalue()


def decode(data: bytes) -> NDArray[np.uint8]:
    """Decode an image file to RGBA, uint8 [height, width, 4]."""
    return np.asarray(Image.open(BytesIO(data)).convert("RGBA"))


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode a grey image, uint8 [height, width], as PNG. Equal pixels give equal bytes."""
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_type=zlib.Z_RLE)
    return file.getvalue()


def encode_exr(pixels: NDArray[np.floating], channels: Sequence[str]) -> bytes:
    """Encode an image as OpenEXR without loss. Equal pixels give equal bytes.

    Args:
        pixels: float16 or float32 [height, width, C].
        channels: Names of the C channels.
    """
    import OpenImageIO as oiio

    height, width, count = pixels.shape
    spec = oiio.ImageSpec(width, height, count, "half" if pixels.dtype == np.float16 else "float")
    spec.channelnames = tuple(channels)
    spec.attribute("compression", "zip")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.exr"  # OpenImageIO writes to files only
        output = oiio.ImageOutput.create(str(path))
        is_written = (
            output is not None
            and output.open(str(path), spec)
            and output.write_image(np.ascontiguousarray(pixels))
            and output.close()
        )
        if not is_written:
            raise OSError(f"an EXR image cannot be written: {oiio.geterror()}")
        return path.read_bytes()


def decode_exr(data: bytes) -> NDArray[np.floating[Any]]:
    """Decode an OpenEXR file.

    Returns:
        [height, width, C], float16 or float32 as stored.

    Raises:
        ValueError: If the data is no OpenEXR file.
    """
    import OpenImageIO as oiio

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.exr"
        path.write_bytes(data)
        image = oiio.ImageInput.open(str(path))
        if image is None:
            raise ValueError(f"not an EXR image: {oiio.geterror()}")
        pixels = image.read_image(str(image.spec().format))
        image.close()
    if pixels is None:
        raise ValueError("not a whole EXR image")
    return np.asarray(pixels)


def decode_any(data: bytes, extension: str) -> NDArray[Any]:
    """Decode the file of a view as it is stored.

    Args:
        data: The file.
        extension: Its name after `<uid>-<view>.`, such as "png" or "depth.exr".

    Returns:
        [height, width] of a mask, otherwise [height, width, C].
    """
    if extension.endswith("exr"):
        return decode_exr(data)
    return np.asarray(Image.open(BytesIO(data)))
