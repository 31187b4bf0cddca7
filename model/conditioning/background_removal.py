"""Image files to RGBA images of one object on a transparent background."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from model.conditioning.cut_out import background_is_removed, without_specks
from model.conditioning.image_preprocessing import load_image, prepare_image
from model.config import PATCH
from pipeline.core.errors import UserError


def load_foreground(path: Path, *, keep_background: bool = False) -> Image.Image:
    """Load an image of an object whose background is transparent.

    An image whose transparency cuts out an object is taken without specks of haze. From another
    image the rembg library removes the background, if it is installed.

    Args:
        path: The image file.
        keep_background: Take the image as it is: all that is not transparent is the object.

    Returns:
        An RGBA image.

    Raises:
        UserError: If the image cannot be used, or its background was not clearly removed and rembg
            is not installed. The message names the file.
    """
    try:
        image = load_image(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not keep_background:
        if not background_is_removed(image):
            image = _remove_background(path, image)
        image = without_specks(image)
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
            f"{path} is not clearly cut out: less than half of its border is transparent, or it is "
            "a picture with rounded corners; save it with a transparent background, "
            "`pip install rembg` to have the background removed, or pass --keep-background"
        ) from error
    result = rembg.remove(image.convert("RGB"))
    assert isinstance(result, Image.Image)
    return result.convert("RGBA")
