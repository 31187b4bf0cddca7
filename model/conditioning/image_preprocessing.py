"""Preparation of images: any file to RGBA, the foreground centred on white, augmentation."""

from __future__ import annotations

import math
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.config import Augmentation, Preparation

# White pixels on every side of the foreground, before the resize to the encoder's size.
# Direct3D-S2 paper (arXiv 2505.17412), section 4.
PADDING = 16
# Smallest alpha of the foreground. Background removal leaves a haze of smaller values.
OPAQUE = 13
# Smallest share of an image that the published pipeline crops to.
PUBLISHED_MIN_SHARE = 1e-3
MAX_SIDE = 8192
MAX_PIXELS = MAX_SIDE**2  # which take 268 MB as RGBA
MIN_FOREGROUND = 8  # pixels along the longer side of the foreground
WHITE = (255, 255, 255)
ORIENTATION = 0x0112  # tag of EXIF
# How an image of each orientation is turned upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """The input of an image encoder: the foreground, centred on white.

    Attributes:
        rgb: [size, size, 3].
        mask: [size, size], true on the foreground.
    """

    rgb: NDArray[np.uint8]
    mask: NDArray[np.bool_]


def load_image(
    source: Path | str | BinaryIO, *, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Load an image file as upright 8-bit RGBA.

    Greyscale, 16-bit, palette and CMYK files are converted. Of an animation the first frame is
    taken.

    Args:
        source: The file.
        name: Name of the image in messages. None takes the path, or "image".
        max_pixels: Largest number of pixels. They are counted before they are decoded.

    Raises:
        ValueError: If the file is no image or is damaged, if its values have no known range (32-bit
            or float), or if it has more than `max_pixels` pixels.
    """
    if name is None:
        name = str(source) if isinstance(source, (str, Path)) else "image"
    try:
        with warnings.catch_warnings():
            # The limit below is stricter than Pillow's.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source)
        _check_size(name, *image.size, max_pixels)
        image.seek(0)
        raw_modes = " ".join(str(tile[3]) for tile in image.tile)
        image.load()
        return _rgba(name, _with_eight_bit_key(_upright(image), raw_modes))
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} must have at most {MAX_PIXELS} pixels ({MAX_SIDE} x {MAX_SIDE}): {error}"
        ) from error
    except (OSError, SyntaxError, EOFError) as error:  # also a missing or an unidentified file
        cause = getattr(error, "strerror", None) or error
        raise ValueError(f"{name} must be a readable image: {cause}") from error


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its orientation tag says. Damaged metadata is ignored."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION) or 1)
    except (SyntaxError, ValueError, TypeError, struct.error):
        return image
    return image if turn is None else image.transpose(turn)


def _with_eight_bit_key(image: Image.Image, raw_modes: str) -> Image.Image:
    """Return an image whose transparent colour has as many bits as its pixels.

    Pillow converts RGB of 16 bits and grey of 2 and 4 bits to 8 bits, but not the colour that a PNG
    declares transparent.
    """
    key = image.info.get("transparency")
    if "16" in raw_modes and image.mode == "RGB" and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if image.mode == "L" and isinstance(key, int):
        bits = next((bits for bits in (2, 4) if f"L;{bits}" in raw_modes), 8)
        image.info["transparency"] = key * 255 // (2**bits - 1)
    return image


def _check_size(name: str, width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    if width * height > max_pixels:
        side = math.isqrt(max_pixels)
        raise ValueError(
            f"{name} must have at most {max_pixels} pixels ({side} x {side}), "
            f"got {width} x {height} = {width * height}: make it smaller"
        )


def _rgba(name: str, image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        values, key = np.asarray(image), image.info.get("transparency")
        grey = np.rint(values.astype(np.float32) / 257).astype(np.uint8)  # 65535 becomes 255
        image = Image.fromarray(grey, "L")
        if key is not None:  # the grey value that a PNG declares transparent
            image.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"{name} must have 8 or 16 bits for each channel, got mode {image.mode!r}: "
            "save it as an 8-bit PNG"
        )
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        image = image.convert("RGB")
    return image.convert("RGBA")


def has_alpha(image: Image.Image) -> bool:
    """Return whether some pixel of an RGBA image is not opaque."""
    return image.getchannel("A").getextrema() != (255, 255)


def prepare_image(
    image: Image.Image | NDArray[np.uint8],
    size: int = 518,
    *,
    augmentation: Augmentation | None = None,
    rng: np.random.Generator | None = None,
    whole_if_opaque: bool = False,
    preparation: Preparation = "one_resize",
) -> PreparedImage:
    """Crop an image to its foreground, centre it in a square, pad it and resize it, all on white.

    The foreground is where alpha is at least OPAQUE. Without augmentation its longer side takes
    size * size / (size + 2 * PADDING) pixels of the result.

    The published Direct3D-S2 pipeline takes every pixel with alpha above 0 as foreground, cuts the
    colours off to 8 bits before it resizes, and resizes twice. Its weights were trained so.

    Args:
        image: RGBA, as an image or uint8 [h, w, 4], with colour not premultiplied by alpha.
        size: Pixels along one side of the result.
        augmentation: Random changes for training.
        rng: Source of the random numbers of the augmentation, given with it only.
        whole_if_opaque: Take all of an image without transparent pixels as foreground.
        preparation: "one_resize", or "published" without augmentation.

    Raises:
        ValueError: If the image is not RGBA, has no foreground or one below MIN_FOREGROUND pixels,
            or has no transparent pixel and `whole_if_opaque` is false.
    """
    if (augmentation is None) != (rng is None):
        raise ValueError("rng must be given with augmentation, and only then")
    if not isinstance(image, Image.Image):
        if image.ndim != 3 or image.shape[2] != 4 or image.dtype != np.uint8:
            raise ValueError(
                f"image must be RGBA uint8 [h, w, 4], got {image.dtype} {list(image.shape)}"
            )
        height, width = image.shape[:2]
        image = Image.fromarray(image) if image.size else Image.new("RGBA", (width, height))
    if image.mode != "RGBA":
        raise ValueError(f"image must be RGBA uint8 [h, w, 4], got mode {image.mode!r}")
    _check_size("image", *image.size)
    foreground = _crop_to_foreground(image, whole_if_opaque)
    if preparation == "published":
        if augmentation is not None:
            raise ValueError('augmentation needs preparation "one_resize", got "published"')
        return _prepared_as_published(image, size)
    square = _SquareImage.around(foreground)
    padding = PADDING
    if augmentation is not None and rng is not None:
        square, padding = _augmented(square, augmentation, rng)
    rgb, alpha = (np.asarray(layer) for layer in square.resized(size, padding))
    if augmentation is not None and rng is not None and augmentation.color_probability:
        rgb = _recolored(rgb, alpha, augmentation, rng)
    mask = alpha >= OPAQUE
    if augmentation is not None and rng is not None and augmentation.erase_probability:
        rgb, mask = _erased(rgb, mask, augmentation, rng)
    return PreparedImage(rgb, mask)


def _prepared_as_published(image: Image.Image, size: int) -> PreparedImage:
    """Prepare an image as the published Direct3D-S2 pipeline does."""
    pixels = np.asarray(image)
    mask = pixels[..., 3] > 0
    if mask.mean() >= PUBLISHED_MIN_SHARE:
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        pixels, mask = pixels[box], mask[box]
    # Composited on white and cut off, not rounded.
    alpha = pixels[..., 3:].astype(np.float32) / 255
    blended = 255 * (pixels[..., :3].astype(np.float32) / 255 * alpha + (1 - alpha))
    rgb = blended.astype(np.uint8)
    height, width = mask.shape
    side = max(height, width)
    corner = ((side - width) // 2, (side - height) // 2)
    results = []
    for layer, fill, resampling in (
        (Image.fromarray(rgb), WHITE, Image.Resampling.BILINEAR),
        (Image.fromarray(255 * mask.astype(np.uint8)), 0, Image.Resampling.NEAREST),
    ):
        square = Image.new(layer.mode, (side, side), fill)
        square.paste(layer, corner)
        wide = size + 2 * PADDING
        padded = Image.new(layer.mode, (wide, wide), fill)
        padded.paste(square.resize((size, size), resampling), (PADDING, PADDING))
        results.append(np.asarray(padded.resize((size, size), resampling)))
    return PreparedImage(results[0], results[1] > 0)


def _crop_to_foreground(image: Image.Image, whole_if_opaque: bool) -> Image.Image:
    if not whole_if_opaque and image.width * image.height and not has_alpha(image):
        raise ValueError(
            "image must have an alpha channel that is transparent around the object, got one "
            "without a transparent pixel: remove the background first"
        )
    alpha = image.getchannel("A")
    box = alpha.point([0] * OPAQUE + [255] * (256 - OPAQUE)).getbbox()
    if box is None:
        largest = alpha.getextrema()[1] if image.width * image.height else 0
        raise ValueError(
            f"image must have a foreground (alpha of at least {OPAQUE}), "
            f"its largest alpha is {largest}"
        )
    crop = image.crop(box)
    found = f"{crop.width} x {crop.height}"
    if max(crop.size) < MIN_FOREGROUND:
        raise ValueError(
            f"image must have a foreground of at least {MIN_FOREGROUND} pixels, got {found}"
        )
    # The crop is pasted into a square.
    if max(crop.size) > MAX_SIDE:
        raise ValueError(
            f"image must have a foreground within {MAX_SIDE} x {MAX_SIDE} pixels, "
            f"got {found}: make it smaller"
        )
    return crop


@dataclass(frozen=True)
class _SquareImage:
    """A square image on white, and its alpha.

    Both are resampled alike, so that they stay aligned and edges get no halo.
    """

    rgb: Image.Image
    alpha: Image.Image

    @classmethod
    def around(cls, foreground: Image.Image) -> _SquareImage:
        side = max(foreground.size)
        corner = ((side - foreground.width) // 2, (side - foreground.height) // 2)
        mask = foreground.getchannel("A")
        rgb, alpha = Image.new("RGB", (side, side), WHITE), Image.new("L", (side, side), 0)
        rgb.paste(foreground.convert("RGB"), corner, mask)
        alpha.paste(mask, corner)
        return cls(rgb, alpha)

    def rotated(self, degrees: float) -> _SquareImage:
        bilinear = Image.Resampling.BILINEAR
        rgb = self.rgb.rotate(degrees, bilinear, fillcolor=WHITE)
        return _SquareImage(rgb, self.alpha.rotate(degrees, bilinear, fillcolor=0))

    def cropped(self, left: int, top: int, side: int) -> _SquareImage:
        box = (left, top, left + side, top + side)
        return _SquareImage(self.rgb.crop(box), self.alpha.crop(box))

    def resized(self, size: int, padding: int) -> tuple[Image.Image, Image.Image]:
        """Resize, pad and resize again, in one resampling.

        The result is that of a resize to `size`, `padding` pixels on every side, and another resize
        to `size`.
        """
        inner = max(1, round(size * size / (size + 2 * padding)))
        corner = (size - inner) // 2
        results = []
        for image, fill in ((self.rgb, WHITE), (self.alpha, 0)):
            result = Image.new(image.mode, (size, size), fill)
            result.paste(image.resize((inner, inner), Image.Resampling.BILINEAR), (corner, corner))
            results.append(result)
        return results[0], results[1]


def _augmented(
    square: _SquareImage, chosen: Augmentation, rng: np.random.Generator
) -> tuple[_SquareImage, int]:
    """Rotate and crop at random and choose the padding.

    All random numbers are always drawn, so that one choice does not change another.
    """
    rotate, crop, angle, ratio, left, top = rng.random(6)
    padding = int(rng.integers(chosen.padding[0], chosen.padding[1], endpoint=True))
    if rotate < chosen.rotation_probability:
        square = square.rotated((2 * angle - 1) * chosen.rotation_degrees)
    if crop < chosen.crop_probability:
        side = square.rgb.width
        kept = max(1, math.floor(side * (chosen.crop_ratio + ratio * (1 - chosen.crop_ratio))))
        left, top = (round(share * (side - kept)) for share in (left, top))
        cropped = square.cropped(left, top, kept)
        # A crop without any foreground is not used.
        if cropped.alpha.getextrema()[1] >= OPAQUE:
            square = cropped
    return square, padding


def _recolored(
    rgb: NDArray[np.uint8],
    alpha: NDArray[np.uint8],
    chosen: Augmentation,
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """Change the colours of the foreground at random. The white behind it stays white.

    All random numbers are always drawn, so that one choice does not change another.

    Args:
        rgb: Colours on white, [h, w, 3].
        alpha: Opacity, [h, w].
        chosen: Probability and limits.
        rng: Source of the random numbers.
    """
    probability, brightness, saturation, hue = rng.random(4)
    if probability >= chosen.color_probability:
        return rgb
    matrix = _color_matrix(
        1 + (2 * brightness - 1) * chosen.brightness,
        1 + (2 * saturation - 1) * chosen.saturation,
        math.radians((2 * hue - 1) * chosen.hue_degrees),
    )
    # The map is linear, so that colours that were multiplied by alpha stay so.
    white = 255 - alpha[..., None].astype(np.float32)
    changed = (rgb - white) @ matrix.T + white
    return np.rint(changed.clip(0, 255)).astype(np.uint8)


def _erased(
    rgb: NDArray[np.uint8],
    mask: NDArray[np.bool_],
    chosen: Augmentation,
    rng: np.random.Generator,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Turn a rectangle at random into background, unless no foreground would be left.

    All random numbers are always drawn, so that one choice does not change another.

    Args:
        rgb: Colours on white, [h, w, 3].
        mask: Where the foreground is, [h, w].
        chosen: Probability and limits.
        rng: Source of the random numbers.
    """
    probability, height, width, top, left = rng.random(5)
    if probability >= chosen.erase_probability:
        return rgb, mask
    smallest, largest = chosen.erase_size
    rectangle = []
    for side, share, place in zip(mask.shape, (height, width), (top, left), strict=True):
        extent = max(1, round(side * (smallest + share * (largest - smallest))))
        first = round(place * (side - extent))
        rectangle.append(slice(first, first + extent))
    kept = mask.copy()
    kept[*rectangle] = False
    if not kept.any():
        return rgb, mask
    erased = rgb.copy()
    erased[*rectangle] = WHITE
    return erased, kept


def _color_matrix(brightness: float, saturation: float, hue: float) -> NDArray[np.float32]:
    """Return the map of RGB that scales brightness and saturation and turns the hue.

    The hue is turned about the grey axis, from red to green.

    Args:
        brightness: Factor of all channels.
        saturation: Factor of the distance from the grey of the same mean.
        hue: Angle in radians.

    Returns:
        float32 [3, 3].
    """
    grey = np.full((3, 3), 1 / 3)  # the projection on the grey axis
    turned = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    colorful = math.cos(hue) * (np.eye(3) - grey) + math.sin(hue) * turned
    return (brightness * (grey + saturation * colorful)).astype(np.float32)
