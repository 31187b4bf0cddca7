"""Image files to RGBA images of one object on a transparent background."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from model.conditioning.cut_out import background_is_removed, without_specks
from model.conditioning.image_preprocessing import MAX_PIXELS, load_image, prepare_image
from model.config import PATCH
from pipeline.core.errors import UserError


class BackgroundKept(UserError):
    """The background of an image was not removed, because the library for it is missing."""


def load_foreground(
    path: Path,
    *,
    keep_background: bool = False,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """Load an image of an object whose background is transparent.

    An image whose transparency cuts out an object is taken without specks of haze. From another
    image the rembg library removes the background, if it is installed.

    Args:
        path: The image file.
        keep_background: Take the image as it is: all that is not transparent is the object.
        name: Name of the image in messages. None takes the path.
        max_pixels: Largest number of pixels of the image.

    Returns:
        An RGBA image.

    Raises:
        BackgroundKept: If the background was not clearly removed and rembg is not installed.
        UserError: If the image cannot be used. The message names the file.
    """
    name = name or str(path)
    try:
        image = load_image(path, name=name, max_pixels=max_pixels)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not keep_background:
        if not background_is_removed(image):
            image = _remove_background(name, image)
        image = without_specks(image)
    return check_foreground(name, image, keep_background=keep_background)


def check_foreground(
    name: str, image: Image.Image, *, keep_background: bool = False
) -> Image.Image:
    """Return an RGBA image unchanged if the models can take its foreground.

    Args:
        name: Name of the image in messages.
        image: RGBA.
        keep_background: Take all of an image without transparent pixels as the object.

    Raises:
        UserError: If it has no usable foreground (see `prepare_image`).
    """
    # Errors of the preparation are found here, before any model is loaded.
    try:
        prepare_image(image, PATCH, whole_if_opaque=keep_background)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    return image


def _remove_background(name: str, image: Image.Image) -> Image.Image:
    try:
        import rembg  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise BackgroundKept(
            f"{name} is not clearly cut out: less than half of its border is transparent, or what "
            "is opaque has the shape of a picture; save it with a transparent background, "
            "`pip install rembg[cpu]` to have the background removed, or pass --keep-background"
        ) from error
    result = rembg.remove(image.convert("RGB"))
    assert isinstance(result, Image.Image)
    return result.convert("RGBA")
