"""An image file to the picture of one object on a transparent background, or a clear word about what is missing."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from model.conditioning.image_preprocessing import has_alpha, load_image, prepare_image
from model.config import PATCH
from pipeline.core.errors import UserError


def load_foreground(path: Path, *, keep_background: bool = False) -> Image.Image:
    """RGBA of an image file, its background transparent.

    An image with alpha is taken as it is. From an opaque one the rembg library removes the background, if it is
    installed; with `keep_background` all of it counts as the object. UserError, naming the file, if the image cannot
    be used (see `load_image` and `prepare_image` of `model.conditioning.image_preprocessing`), or is opaque and rembg is not there.
    """
    try:
        image = load_image(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not keep_background and not has_alpha(image):
        image = _without_background(path, image)
    try:
        prepare_image(image, PATCH, whole_if_opaque=keep_background)  # before the models are loaded
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return image


def _without_background(path: Path, image: Image.Image) -> Image.Image:
    try:
        import rembg  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"{path} has no transparent pixel, so what is object and what background is not known: save it with "
            "transparency, or `pip install rembg` to have the background removed, or say --keep-background"
        ) from error
    found = rembg.remove(image.convert("RGB"))
    assert isinstance(found, Image.Image)
    return found.convert("RGBA")
