"""ImageTokens images: any file to RGBA, the foreground on white at the encoder's size, and augmentation for training."""

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

from model.config import Augmentation

PADDING = (
    16  # white pixels on every side of the foreground, before the resize to `size`; paper, sec. 4
)
OPAQUE = (
    13  # alpha from which a pixel is foreground: fainter is the haze that background removal leaves
)
MAX_PIXELS = 1 << 26  # 8192^2; decoded RGBA of it takes 268 MB
MIN_FOREGROUND = 8  # pixels along the longer side
WHITE = (255, 255, 255)
ORIENTATION = 0x0112  # EXIF; what each of its values asks for:
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
    """What an encoder sees of one image: the foreground, centred on white, and where it is."""

    rgb: NDArray[np.uint8]  # [size, size, 3]
    mask: NDArray[np.bool_]  # [size, size] true on the foreground


def load_image(source: Path | str | BinaryIO) -> Image.Image:
    """An image file as 8-bit RGBA, upright; of an animation the first frame.

    Greyscale, 16-bit, palette and CMYK files are converted. ValueError if it is not an image, is broken, holds numbers
    without a known range (32-bit or float), or has more than MAX_PIXELS pixels.
    """
    name = str(source) if isinstance(source, (str, Path)) else "image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", Image.DecompressionBombWarning
            )  # the limit below is stricter
            image = Image.open(source)
        _check_size(name, *image.size)
        image.seek(0)
        image.load()
        return _rgba(name, _upright(image))
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} must have at most {MAX_PIXELS} pixels (8192 x 8192): {error}"
        ) from error
    except (
        OSError,
        SyntaxError,
        EOFError,
    ) as error:  # FileNotFoundError and UnidentifiedImageError among them
        raise ValueError(f"{name} must be a readable image: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    """Turned as the file's orientation tag says; nothing else of its metadata is looked at, which may be damaged."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION) or 1)
    except (SyntaxError, ValueError, TypeError, struct.error):  # what unreadable metadata raises
        return image
    return image if turn is None else image.transpose(turn)


def _check_size(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        found = f"{width} x {height} = {width * height}"
        raise ValueError(
            f"{name} must have at most {MAX_PIXELS} pixels (8192 x 8192), got {found}: make it smaller"
        )


def _rgba(name: str, image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.float32) / 257  # 65535 becomes 255
        image = Image.fromarray(np.rint(grey).astype(np.uint8), "L")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"{name} must have 8 or 16 bits a channel, got mode {image.mode!r}: save it as an 8-bit PNG"
        )
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV", "1"):
        image = image.convert("RGB")
    return image.convert("RGBA")


def has_alpha(image: Image.Image) -> bool:
    """Whether some pixel of an RGBA image is not opaque."""
    return image.getchannel("A").getextrema() != (255, 255)


def prepare_image(
    image: Image.Image | NDArray[np.uint8],
    size: int = 518,
    *,
    augmentation: Augmentation | None = None,
    rng: np.random.Generator | None = None,
    whole_if_opaque: bool = False,
) -> PreparedImage:
    """Crops to the foreground, centres it in a square, pads, resizes to size, all on white.

    image: RGBA, as from `load_image` or [h, w, 4] uint8, colour not premultiplied. The foreground is where alpha is at
    least OPAQUE; it spans size * size / (size + 2 * PADDING) pixels of the result along its longer side. `augmentation`
    takes its random numbers from rng alone. ValueError if the image is not RGBA, has no foreground or one below
    MIN_FOREGROUND pixels, or is opaque everywhere (unless that is allowed: then all of it is foreground).
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
    foreground = _crop(image, whole_if_opaque)
    canvas = _Canvas.around(foreground)
    padding = PADDING
    if augmentation is not None and rng is not None:
        canvas, padding = _augmented(canvas, augmentation, rng)
    rgb, alpha = canvas.resized(size, padding)
    return PreparedImage(np.asarray(rgb), np.asarray(alpha) >= OPAQUE)


def _crop(image: Image.Image, whole_if_opaque: bool) -> Image.Image:
    if not whole_if_opaque and image.width * image.height and not has_alpha(image):
        raise ValueError(
            "image must have an alpha channel that is transparent around the object, got one without a transparent "
            "pixel: remove the background first"
        )
    alpha = image.getchannel("A")
    box = alpha.point([0] * OPAQUE + [255] * (256 - OPAQUE)).getbbox()
    if box is None:
        most = alpha.getextrema()[1] if image.width * image.height else 0
        raise ValueError(
            f"image must have a foreground (alpha of at least {OPAQUE}), its largest alpha is {most}"
        )
    crop = image.crop(box)
    found = f"{crop.width} x {crop.height}"
    if max(crop.size) < MIN_FOREGROUND:
        raise ValueError(
            f"image must have a foreground of at least {MIN_FOREGROUND} pixels, got {found}"
        )
    if max(crop.size) ** 2 > MAX_PIXELS:  # it becomes a square
        raise ValueError(
            f"image must have a foreground within 8192 x 8192 pixels, got {found}: make it smaller"
        )
    return crop


@dataclass(frozen=True)
class _Canvas:
    """A square image on white with its alpha; resampling both alike keeps them aligned and the edges free of halos."""

    rgb: Image.Image
    alpha: Image.Image

    @classmethod
    def around(cls, foreground: Image.Image) -> _Canvas:
        side = max(foreground.size)
        corner = ((side - foreground.width) // 2, (side - foreground.height) // 2)
        mask = foreground.getchannel("A")
        rgb, alpha = Image.new("RGB", (side, side), WHITE), Image.new("L", (side, side), 0)
        rgb.paste(foreground.convert("RGB"), corner, mask)
        alpha.paste(mask, corner)
        return cls(rgb, alpha)

    def rotated(self, degrees: float) -> _Canvas:
        bilinear = Image.Resampling.BILINEAR
        rgb = self.rgb.rotate(degrees, bilinear, fillcolor=WHITE)
        return _Canvas(rgb, self.alpha.rotate(degrees, bilinear, fillcolor=0))

    def cropped(self, left: int, top: int, side: int) -> _Canvas:
        box = (left, top, left + side, top + side)
        return _Canvas(self.rgb.crop(box), self.alpha.crop(box))

    def resized(self, size: int, padding: int) -> tuple[Image.Image, Image.Image]:
        """As a resize to size, `padding` pixels on every side and a resize to size again, in one resampling."""
        inner = max(1, round(size * size / (size + 2 * padding)))
        corner = (size - inner) // 2
        results = []
        for image, fill in ((self.rgb, WHITE), (self.alpha, 0)):
            result = Image.new(image.mode, (size, size), fill)
            result.paste(image.resize((inner, inner), Image.Resampling.BILINEAR), (corner, corner))
            results.append(result)
        return results[0], results[1]


def _augmented(
    canvas: _Canvas, chosen: Augmentation, rng: np.random.Generator
) -> tuple[_Canvas, int]:
    """Rotation, crop and padding. All random numbers are drawn whatever happens, so that one choice moves no other."""
    rotate, crop, angle, ratio, left, top = rng.random(6)
    padding = int(rng.integers(chosen.padding[0], chosen.padding[1], endpoint=True))
    if rotate < chosen.rotation_probability:
        canvas = canvas.rotated((2 * angle - 1) * chosen.rotation_degrees)
    if crop < chosen.crop_probability:
        side = canvas.rgb.width
        kept = max(1, math.floor(side * (chosen.crop_ratio + ratio * (1 - chosen.crop_ratio))))
        left, top = (round(share * (side - kept)) for share in (left, top))
        smaller = canvas.cropped(left, top, kept)
        if smaller.alpha.getextrema()[1] >= OPAQUE:  # something is left to see
            canvas = smaller
    return canvas, padding
