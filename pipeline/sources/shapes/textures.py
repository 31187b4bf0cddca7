"""Seeded colours and small procedural textures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Rng = np.random.Generator
Color = tuple[float, float, float]
Texture = NDArray[np.uint8]

PALETTES: tuple[tuple[str, ...], ...] = (
    ("264653", "2a9d8f", "e9c46a", "f4a261", "e76f51"),
    ("003049", "d62828", "f77f00", "fcbf49", "eae2b7"),
    ("606c38", "283618", "fefae0", "dda15e", "bc6c25"),
    ("ef476f", "ffd166", "06d6a0", "118ab2", "073b4c"),
    ("3d405b", "e07a5f", "f4f1de", "81b29a", "f2cc8f"),
    ("5f0f40", "9a031e", "fb8b24", "e36414", "0f4c5c"),
    ("cdb4db", "ffc8dd", "ffafcc", "bde0fe", "a2d2ff"),
    ("22577a", "38a3a5", "57cc99", "80ed99", "c7f9cc"),
)
WOODS = ("8b5a2b", "a0703c", "c19a6b", "6f4518", "d4a373")
METALS = ("b8bcc2", "8d99ae", "c9a227", "b87333", "6c757d")


def from_hex(text: str) -> Color:
    """Return the sRGB colour of six hex digits."""
    r, g, b = (int(text[i : i + 2], 16) / 255 for i in (0, 2, 4))
    return r, g, b


def palette(rng: Rng) -> list[Color]:
    """Return five matching colours in random order."""
    chosen = PALETTES[rng.integers(len(PALETTES))]
    return [from_hex(chosen[i]) for i in rng.permutation(len(chosen))]


def pick(rng: Rng, colors: tuple[str, ...]) -> Color:
    """Return one of several colours at random."""
    return from_hex(colors[rng.integers(len(colors))])


def shaded(color: Color, factor: float) -> Color:
    """Return a darker (factor < 1) or lighter version of a colour."""
    r, g, b = (factor * channel for channel in color)
    return r, g, b


def checker(a: Color, b: Color, cells: int, size: int = 128) -> Texture:
    """Return a checkerboard with `cells` fields per side."""
    i = np.arange(size) * cells // size
    return _mixed(a, b, ((i[:, None] + i[None, :]) % 2).astype(np.float64))


def stripes(colors: list[Color], count: int, size: int = 128, *, upright: bool = True) -> Texture:
    """Return `count` vertical (`upright`) or horizontal stripes."""
    i = np.arange(size) * count // size % len(colors)
    row = np.array(colors)[i]
    image = np.broadcast_to(row[None] if upright else row[:, None], (size, size, 3))
    return _bytes(image)


def gradient(top: Color, bottom: Color, size: int = 128) -> Texture:
    """Return a square texture that changes from the colour `top` to the colour `bottom`."""
    t = np.linspace(0, 1, size)[:, None]
    return _mixed(top, bottom, np.broadcast_to(t, (size, size)))


def noise(rng: Rng, a: Color, b: Color, size: int = 128, octaves: int = 4) -> Texture:
    """Return tileable value noise between two colours."""
    total = np.zeros((size, size))
    for octave in range(octaves):
        cells = 4 * 2**octave
        total += _smooth_grid(rng.random((cells, cells)), size) / 2**octave
    low, high = total.min(), total.max()
    return _mixed(a, b, (total - low) / (high - low))


def wood(rng: Rng, base: Color, size: int = 128) -> Texture:
    """Return wood with its grain along v."""
    warp = _smooth_grid(rng.random((3, 8)), size)
    rings = 0.5 + 0.5 * np.sin(2 * np.pi * (np.arange(size)[None, :] / size * 6 + warp * 1.2))
    return _mixed(base, shaded(base, 0.62), 0.7 * rings + 0.3 * rng.random((1, size)))


def dots(a: Color, b: Color, count: int, size: int = 128) -> Texture:
    """Return `count` x `count` dots of colour `b` on `a`."""
    t = np.arange(size) / size * count % 1 - 0.5
    return _mixed(a, b, (t[:, None] ** 2 + t[None, :] ** 2 < 0.08).astype(np.float64))


def bricks(rng: Rng, brick: Color, mortar: Color, rows: int = 8, size: int = 128) -> Texture:
    """Return a brick wall of `rows` rows."""
    y = np.arange(size)[:, None] * rows / size
    x = np.arange(size)[None, :] * rows / 2 / size + 0.5 * (y.astype(int) % 2)
    gap = (y % 1 < 0.12) | (x % 1 < 0.06)
    shade = rng.uniform(0.8, 1.1, (rows, rows))[y.astype(int) % rows, x.astype(int) % (rows // 2)]
    image = np.where(gap[..., None], np.array(mortar), np.array(brick) * shade[..., None])
    return _bytes(image)


def _smooth_grid(values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Interpolate a periodic grid [M, N] smoothly to [size, size]."""
    for axis in (0, 1):
        cells = values.shape[axis]
        t = np.arange(size) * cells / size
        low = t.astype(int)
        blend = t - low
        blend = blend * blend * (3 - 2 * blend)
        blend = blend[:, None] if axis == 0 else blend[None, :]
        first = np.take(values, low, axis=axis)
        second = np.take(values, (low + 1) % cells, axis=axis)
        values = first * (1 - blend) + second * blend
    return values


def _mixed(a: Color, b: Color, weight: NDArray[np.float64]) -> Texture:
    weight = np.clip(weight, 0, 1)[..., None]
    return _bytes(np.array(a) * (1 - weight) + np.array(b) * weight)


def _bytes(image: NDArray[np.float64]) -> Texture:
    """Convert values in 0..1 to 8 bits."""
    return np.ascontiguousarray(np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8))
