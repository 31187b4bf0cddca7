"""Some transparent pixels do not make a picture an object without background."""

import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from model.conditioning.background_removal import load_foreground
from model.conditioning.cut_out import background_is_removed, without_specks
from model.conditioning.image_preprocessing import load_image, prepare_image
from pipeline.core.errors import UserError

SIDE = 128
Y, X = np.mgrid[:SIDE, :SIDE]


def picture(alpha):
    """Return a noisy RGBA picture with this alpha [SIDE, SIDE]."""
    rgb = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    return Image.fromarray(np.dstack([rgb, np.broadcast_to(alpha, (SIDE, SIDE)).astype(np.uint8)]))


def one_pixel():
    alpha = np.full((SIDE, SIDE), 255)
    alpha[3, 5] = 0
    return alpha


def rounded(radius):
    """Return the alpha of a picture with rounded corners."""
    dx = np.maximum(np.abs(X - (SIDE - 1) / 2) - (SIDE / 2 - radius), 0)
    dy = np.maximum(np.abs(Y - (SIDE - 1) / 2) - (SIDE / 2 - radius), 0)
    return np.where(dx**2 + dy**2 <= radius**2, 255, 0)


def disc(radius, cx=SIDE / 2, cy=SIDE / 2):
    return np.where((X - cx) ** 2 + (Y - cy) ** 2 <= radius**2, 255, 0)


def framed(side, width, height, radius=0):
    """Return the alpha of a picture in a transparent frame."""
    dx, dy = (
        np.maximum(np.abs(axis - (side - 1) / 2) - (size / 2 - radius), 0)
        for axis, size in ((X, width), (Y, height))
    )
    return np.where(dx**2 + dy**2 <= radius**2, 255, 0)


@pytest.mark.parametrize(
    "alpha",
    [
        np.full((SIDE, SIDE), 255),
        np.full((SIDE, SIDE), 254),
        one_pixel(),
        *(rounded(radius) for radius in (4, 12, 24, 40, 64)),
        np.where((X + Y) % 16 == 0, 20, 255),  # haze over an opaque picture
        *(framed(SIDE, *size) for size in ((120, 120), (128, 80), (80, 128), (60, 90))),
        *(framed(SIDE, 100, 70, radius) for radius in (5, 12)),
        np.maximum(framed(SIDE, 80, 60), framed(SIDE, 100, 80, 10) // 4),  # with a shadow
    ],
)
def test_a_picture_with_some_transparency_still_has_its_background(alpha, tmp_path, monkeypatch):
    assert not background_is_removed(picture(alpha))
    monkeypatch.setitem(sys.modules, "rembg", None)
    path = tmp_path / "picture.png"
    picture(alpha).save(path)
    with pytest.raises(UserError, match=r"picture\.png .*rembg.*--keep-background") as caught:
        load_foreground(path)
    assert "\n" not in str(caught.value)
    kept = load_foreground(path, keep_background=True)
    assert (np.asarray(kept) == np.asarray(picture(alpha))).all()


@pytest.mark.parametrize(
    "alpha",
    [
        disc(20),
        disc(62),
        disc(90, cy=SIDE + 40),  # cut off by the lower border
        np.where((X > 60) & (X < 67), 255, 0),  # a pole through the picture
        np.where(np.abs(X - 64) + np.abs(Y - 64) < 64, 255, 0),  # touches every side
        np.where(disc(40) > 0, 90, 5),  # a translucent object in faint haze
    ],
)
def test_a_cut_out_object_is_recognised(alpha):
    assert background_is_removed(picture(alpha))


def test_specks_of_haze_do_not_make_the_object_small(tmp_path):
    alpha = disc(20)
    clean = prepare_image(picture(alpha), 56)
    specks = alpha.copy()
    specks[2, 2] = specks[120, 125] = specks[121, 126] = 20
    assert prepare_image(picture(specks), 56).mask.mean() < 0.2 * clean.mask.mean()
    path = tmp_path / "object.png"
    picture(specks).save(path)
    prepared = prepare_image(load_foreground(path), 56)
    assert (prepared.rgb == clean.rgb).all()
    assert (prepared.mask == clean.mask).all()


def test_a_rectangle_of_one_colour_is_an_object():
    """A picture in a frame has several colours."""
    alpha = framed(SIDE, 80, 60).astype(np.uint8)
    image = Image.new("RGBA", (SIDE, SIDE), (200, 30, 10, 255))
    image.putalpha(Image.fromarray(alpha))
    assert background_is_removed(image)
    assert not background_is_removed(picture(alpha))


def test_a_patch_of_haze_does_not_make_the_object_small():
    patch = np.where((X < 8) & (Y < 8), 60, 0)  # a hundredth of the object's sum of alpha
    alpha = np.maximum(disc(30), patch)
    kept = np.asarray(without_specks(picture(alpha)).getchannel("A"))
    assert (kept == disc(30)).all()
    solid = np.where(patch > 0, 255, alpha)  # a part of the object
    assert (np.asarray(without_specks(picture(solid)).getchannel("A")) == solid).all()


def test_small_parts_of_an_object_are_no_specks():
    image = picture(disc(40) + disc(3, 10, 10))
    assert without_specks(image).tobytes() == image.tobytes()


def png(depth, color_type, rows, key):
    """Return a PNG with a transparent colour. `rows` are the bytes of each row."""

    def chunk(name, data):
        body = name + data
        return len(data).to_bytes(4) + body + zlib.crc32(body).to_bytes(4)

    header = len(rows).to_bytes(4) * 2 + bytes([depth, color_type, 0, 0, 0])
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"tRNS", key), chunk(b"IDAT", data), chunk(b"IEND", b"")]
    )


OBJECT = disc(40) > 0


def packed(values, depth):
    """Return rows of values with several of them in a byte."""
    bits = values[..., None] >> np.arange(depth)[::-1] & 1
    return np.packbits(bits.reshape(SIDE, -1).astype(bool), axis=1)


@pytest.mark.parametrize(
    ("depth", "color_type", "rows", "key"),
    [
        (1, 0, np.packbits(OBJECT, axis=1), b"\0\0"),
        (2, 0, packed(np.where(OBJECT, 1, 2), 2), b"\0\2"),
        (4, 0, packed(np.where(OBJECT, 3, 12), 4), b"\0\x0c"),
        (8, 0, np.where(OBJECT, 7, 200).astype(np.uint8), b"\0\xc8"),
        # 16 bits: 0x1235 is opaque, though its upper byte is that of the transparent 0x1234
        (16, 0, np.where(OBJECT, 0x1235, 0x1234).astype(">u2"), b"\x12\x34"),
        (
            16,
            2,
            np.where(OBJECT[..., None], [0x2000, 0x12AB, 5], [0x1000, 0x12AB, 5]).astype(">u2"),
            b"\x10\x00\x12\xab\0\5",
        ),
    ],
)
def test_a_transparent_colour_cuts_out_the_object(depth, color_type, rows, key, tmp_path):
    path = tmp_path / "key.png"
    path.write_bytes(png(depth, color_type, [row.tobytes() for row in rows], key))
    alpha = np.asarray(load_image(path))[..., 3]
    assert (alpha == np.where(OBJECT, 255, 0)).all()
    assert load_foreground(path).getextrema()[3] == (0, 255)
