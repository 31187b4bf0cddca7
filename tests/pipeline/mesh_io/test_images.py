"""Images of every depth and colour type, at pixels whose colours are known."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.mesh_io.images import IMAGE_ERRORS, decode_image

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
COLORS = bytes([1, 2, 3, 4, 5, 6])


def png(depth: int, kind: int, row: bytes, width: int, *, transparent=None, palette=None) -> bytes:
    """Return a PNG file with one row of pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header)]
    if palette is not None:
        parts.append(chunk(b"PLTE", palette))
    if transparent is not None:
        parts.append(chunk(b"tRNS", transparent))
    return b"".join([*parts, chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")])


def wide(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


def ktx2(color: tuple[int, int, int, int], *, width=4, height=4) -> bytes:
    """Return a KTX2 file of UASTC blocks of one colour (mode 8 of the format: code 0x17)."""
    bits = 0x17 | int.from_bytes(bytes(color), "little") << 5
    block = bits.to_bytes(16, "little")
    data = block * (-(-width // 4) * -(-height // 4))
    descriptor = struct.pack("<IIHHBBBB", 44, 0, 2, 40, 166, 1, 2, 0)
    descriptor += bytes([3, 3, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0])
    descriptor += struct.pack("<HBBIII", 0, 127, 3, 0, 0, 0xFFFFFFFF)
    start = 80 + 24
    header = b"\xabKTX 20\xbb\r\n\x1a\n"
    header += struct.pack("<9I", 0, 1, width, height, 0, 0, 1, 1, 0)
    header += struct.pack("<4I2Q", start, len(descriptor), 0, 0, 0, 0)
    place = -(-(start + len(descriptor)) // 16) * 16
    header += struct.pack("<3Q", place, len(data), len(data))
    return (header + descriptor).ljust(place, b"\0") + data


# Bit depth, data of two pixels, the transparent value, and grey and alpha of the two pixels.
TRANSPARENT_GREY = [
    (1, b"\x80", 1, [(255, 0), (0, 255)]),
    (1, b"\x80", 0, [(255, 255), (0, 0)]),
    (2, b"\x60", 2, [(85, 255), (170, 0)]),
    (4, b"\x5f", 5, [(85, 0), (255, 255)]),
    (8, b"\x05\x06", 5, [(5, 0), (6, 255)]),
    (16, wide(0x0180, 0x0181), 0x0180, [(1, 0), (1, 255)]),
]
IMAGES = {
    f"{depth}-bit grey with the transparent value {value}": (
        png(depth, GREY, data, 2, transparent=wide(value)),
        [(grey, grey, grey, alpha) for grey, alpha in pixels],
    )
    for depth, data, value, pixels in TRANSPARENT_GREY
}
IMAGES |= {
    "16-bit grey is scaled, not clipped": (
        png(16, GREY, wide(0, 0x8000, 0xFFFF), 3),
        [(0, 0, 0, 255), (128, 128, 128, 255), (255, 255, 255, 255)],
    ),
    "dark 16-bit grey stays dark": (png(16, GREY, wide(200), 1), [(1, 1, 1, 255)]),
    "1-bit grey": (png(1, GREY, b"\x80", 2), [(255, 255, 255, 255), (0, 0, 0, 255)]),
    "8-bit grey with alpha": (png(8, GREY_ALPHA, b"\x80\x40", 1), [(128, 128, 128, 64)]),
    "16-bit grey with alpha": (
        png(16, GREY_ALPHA, wide(0x8000, 0x4000), 1),
        [(128, 128, 128, 64)],
    ),
    "8-bit colour with a transparent one": (
        png(8, RGB, COLORS, 2, transparent=wide(4, 5, 6)),
        [(1, 2, 3, 255), (4, 5, 6, 0)],
    ),
    "16-bit colour with a transparent one": (
        png(16, RGB, wide(0x0102, 0, 0, 0x0202, 0, 0), 2, transparent=wide(0x0202, 0, 0)),
        [(1, 0, 0, 255), (2, 0, 0, 0)],
    ),
    "16-bit colour with alpha": (
        png(16, RGBA, wide(0x8000, 0x4000, 0x2000, 0x1000), 1),
        [(128, 64, 32, 16)],
    ),
    "palette with alpha": (
        png(8, PALETTE, b"\0\1", 2, palette=COLORS, transparent=b"\x40"),
        [(1, 2, 3, 64), (4, 5, 6, 255)],
    ),
    "1-bit palette": (
        png(1, PALETTE, b"\x40", 2, palette=COLORS),
        [(1, 2, 3, 255), (4, 5, 6, 255)],
    ),
    "KTX2 with UASTC": (ktx2((10, 200, 30, 128), width=3, height=1), [(10, 200, 30, 128)] * 3),
}


@pytest.mark.parametrize("name", IMAGES)
def test_pixels_have_their_colours(name):
    content, expected = IMAGES[name]
    pixels = decode_image(content, 4096)
    assert pixels.dtype == np.uint8
    assert [tuple(pixel) for pixel in pixels[0].tolist()] == expected


@pytest.mark.parametrize(
    ("format", "mode", "stored", "expected"),
    [
        ("JPEG", "CMYK", (0, 255, 255, 0), (255, 0, 0, 255)),
        ("JPEG", "L", 100, (100, 100, 100, 255)),
        ("WEBP", "RGBA", (10, 200, 30, 128), (10, 200, 30, 128)),
        ("TIFF", "I;16", 0x8000, (128, 128, 128, 255)),
        ("AVIF", "RGB", (255, 0, 0), (255, 0, 0, 255)),
        ("DDS", "RGBA", (10, 200, 30, 128), (10, 200, 30, 128)),
    ],
)
def test_images_of_other_formats_have_their_colours(format, mode, stored, expected):
    file = io.BytesIO()
    options = {"lossless": True} if format == "WEBP" else {}
    Image.new(mode, (8, 8), stored).save(file, format, **options)
    pixels = decode_image(file.getvalue(), 4096)
    assert pixels.shape == (8, 8, 4)
    np.testing.assert_allclose(pixels[4, 4], expected, atol=3)


def test_large_images_are_scaled_down():
    assert decode_image(ktx2((1, 2, 3, 255), width=64, height=16), 32).shape == (8, 32, 4)
    assert decode_image(png(16, GREY, wide(*[7] * 64), 64), 32).shape == (1, 32, 4)


@pytest.mark.parametrize("cut", [13, 60, 90, 120])
def test_a_cut_ktx2_file_is_an_error(cut):
    with pytest.raises(IMAGE_ERRORS):
        decode_image(ktx2((1, 2, 3, 255))[:cut], 4096)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 51.0, 255.0], [0, 51, 255]), ([0.0, np.nan], [0, 0])],
)
def test_grey_images_of_floats_keep_their_steps(values, expected):
    """Shares of 1 became black."""
    file = io.BytesIO()
    Image.fromarray(np.array([values], dtype=np.float32)).save(file, "TIFF")
    pixels = decode_image(file.getvalue(), 100)
    assert pixels[0, :, 0].tolist() == expected
    assert (pixels[..., 3] == 255).all()


@pytest.mark.parametrize("alpha", [0, 1, 10, 255])
def test_scaling_keeps_the_colours_of_transparent_pixels(alpha):
    """They became black or lost their steps, also in materials that do not draw alpha."""
    file = io.BytesIO()
    Image.new("RGBA", (64, 8), (200, 101, 3, alpha)).save(file, "PNG")
    pixels = decode_image(file.getvalue(), 16)
    assert pixels.shape == (2, 16, 4)
    assert (pixels == [200, 101, 3, alpha]).all()
