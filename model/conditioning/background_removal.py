"""Image files to RGBA images of one object on a transparent background."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from model.conditioning.image_preprocessing import has_alpha, load_image, prepare_image
from model.config import PATCH
from pipeline.core.errors import UserError


def load_foreground(path: Path, *, keep_background: bool = False) -> Image.Image:
    """Load an image of an object whose background is transparent.

    An image with transparent pixels is taken as it is. From an opaque image the rembg library
    removes the background, if it is installed.

    Args:
        path: The image file.
        keep_background: Take all of an opaque image as the object.

    Returns:
        An RGBA image.

    Raises:
        UserError: If the image cannot be used, or is opaque and rembg is not installed. The message
            names the file.
    """
    try:
        image = load_image(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not keep_background and not has_alpha(image):
        image = _remove_background(path, image)
    # Errors of the preparation are found here, before any model is loaded.
    try:
        prepare_image(image, PATCH, whole_if_opaque=keep_background)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return image


def _remove_background(path: Path, image: Image.Image) -> Image.Image:
    try:
        import rembg  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"{path} has no transparent pixel, so the object cannot be told from the background: "
            "save it with transparency, `pip install rembg` to have the background removed, or "
            "pass --keep-background"
        ) from error
    result = rembg.remove(image.convert("RGB"))
    assert isinstance(result, Image.Image)
    return result.convert("RGBA")
