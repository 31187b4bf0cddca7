"""Integrals of an environment that shading looks up: blurred mirrors and matte light.

The split-sum approximation (Karis 2013, "Real Shading in Unreal Engine 4") separates the light that
a rough mirror gathers from the share that it reflects. The microfacets have the GGX distribution
with alpha = roughness^2 and height-correlated Smith shadowing.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from math import atan2, floor, log2, pi, sqrt
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pipeline.core.files import replacing
from pipeline.core.hashing import hash_of, sha256_of
from pipeline.rendering import environments
from pipeline.rendering.environments import (
    Environment,
    directions,
    environment,
    environment_files,
    halved,
    irradiance,
)

log = logging.getLogger(__name__)

CACHE = Path.home() / ".cache" / "sparse3d" / "environments"
ARRAYS = ("mirrors", "matte", "coarse")  # of a prepared environment

LEVELS = 4  # blurred panoramas; that of level l is for roughness l / LEVELS and 2**l times smaller
SAMPLES = 32  # directions of one blurred pixel
TABLE_SIDE = 32  # of the table of reflected shares
TABLE_SAMPLES = 512
MAX_RADIANCE = 60_000.0  # what half floats hold


@njit(cache=True)
def _radical_inverse(i: int) -> float:
    """Return the bits of `i` mirrored at the binary point, 0 to 1."""
    value, scale = 0.0, 0.5
    while i:
        value += scale * (i & 1)
        i >>= 1
        scale *= 0.5
    return value


@njit(cache=True)
def _lookup(pixels, start, height, x, y, z, out):
    """Read a panorama bilinearly, out = radiance. `pixels` [P, 3] holds it from row `start`."""
    width = 2 * height
    u = (atan2(x, z) / pi + 1.0) * height - 0.5
    v = np.arccos(min(max(y, -1.0), 1.0)) / pi * height - 0.5
    u0, v0 = floor(u), floor(v)
    fu, fv = u - u0, v - v0
    for dv in range(2):
        row = min(max(int(v0) + dv, 0), height - 1)
        for du in range(2):
            column = (int(u0) + du) % width
            weight = (fu if du else 1 - fu) * (fv if dv else 1 - fv)
            for k in range(3):
                out[k] += weight * pixels[start + row * width + column, k]


@njit(cache=True)
def _blur(pixels, starts, heights, normals, alpha, samples, out):
    """Average each lobe of a rough mirror that is seen from its axis.

    Args:
        pixels: float32 [P, 3], a panorama and its halved copies.
        starts: int64 [L], row of `pixels` where each copy starts.
        heights: int64 [L], heights of the copies.
        normals: float32 [N, 3], axes of the lobes.
        alpha: Width of the GGX distribution.
        samples: Number of directions for each lobe.
        out: float32 [N, 3], the averages.
    """
    pixel_angle = 2 * pi * pi / (heights[0] * heights[0] * 2)
    value = np.zeros(3)
    for n in range(len(normals)):
        nx, ny, nz = normals[n]
        # a frame around the normal
        if abs(ny) < 0.9:
            tx, ty, tz = nz, 0.0, -nx
        else:
            tx, ty, tz = 0.0, -nz, ny
        length = sqrt(tx * tx + ty * ty + tz * tz)
        tx, ty, tz = tx / length, ty / length, tz / length
        bx, by, bz = ny * tz - nz * ty, nz * tx - nx * tz, nx * ty - ny * tx
        value[:] = 0.0
        weight = 0.0
        for i in range(samples):
            e = (i + 0.5) / samples
            angle = 2 * pi * _radical_inverse(i)
            cos_h2 = (1 - e) / (1 + (alpha * alpha - 1) * e)
            cos_h = sqrt(cos_h2)
            sin_h = sqrt(max(1 - cos_h2, 0.0))
            # the view is the normal, so light comes from twice the angle of the half vector
            nl = 2 * cos_h2 - 1
            if nl <= 0:
                continue
            s = 2 * cos_h * sin_h
            a, b = s * np.cos(angle), s * np.sin(angle)
            lobe = cos_h2 * (alpha * alpha - 1) + 1
            density = alpha * alpha / (pi * lobe * lobe) / 4  # of the light's direction
            level = 0.5 * log2(1 / (samples * density) / pixel_angle) + 0.5
            copy = int(min(max(level, 0.0), len(heights) - 1.0))
            sample = np.zeros(3)
            _lookup(
                pixels,
                starts[copy],
                heights[copy],
                a * tx + b * bx + nl * nx,
                a * ty + b * by + nl * ny,
                a * tz + b * bz + nl * nz,
                sample,
            )
            for k in range(3):
                value[k] += nl * sample[k]
            weight += nl
        for k in range(3):
            out[n, k] = value[k] / weight


def blurred(panorama: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Return what mirrors of increasing roughness show.

    Args:
        panorama: float32 [h, 2 * h, 3], h a power of 2 of at least 64.

    Returns:
        LEVELS + 1 panoramas. The first is `panorama`, the others are 2**l times smaller.
    """
    copies = [panorama]
    while len(copies[-1]) > 8:
        copies.append(halved(copies[-1]))
    heights = np.array([len(copy) for copy in copies])
    starts = np.concatenate([[0], np.cumsum(2 * heights * heights)[:-1]])
    pixels = np.concatenate([copy.reshape(-1, 3) for copy in copies])
    levels = [panorama]
    for level in range(1, LEVELS + 1):
        height = len(panorama) >> level
        out = np.empty((2 * height * height, 3), np.float32)
        normals = directions(height).reshape(-1, 3)
        _blur(pixels, starts, heights, normals, (level / LEVELS) ** 2, SAMPLES, out)
        levels.append(out.reshape(height, 2 * height, 3))
    return levels


def enlarged(panorama: NDArray[np.float32], height: int) -> NDArray[np.float16]:
    """Interpolate a panorama bilinearly, float16 [height, 2 * height, 3]."""
    at = (np.arange(2 * height) + 0.5) * len(panorama) / height - 0.5
    low = np.floor(at).astype(int)
    part = (at - low).astype(np.float32)
    rows = [np.clip(low[:height] + step, 0, len(panorama) - 1) for step in (0, 1)]
    weight = part[:height, None, None]
    image = panorama[rows[0]] * (1 - weight) + panorama[rows[1]] * weight
    columns = [(low + step) % (2 * len(panorama)) for step in (0, 1)]
    weight = part[None, :, None]
    return (image[:, columns[0]] * (1 - weight) + image[:, columns[1]] * weight).astype(np.float16)


@dataclass(frozen=True, kw_only=True)
class PreparedEnvironment:
    """What shading looks up of an environment.

    Attributes:
        name: Name of the environment.
        mirrors: float16 [LEVELS + 1, h, 2 * h, 3], the panoramas of `blurred`, all of one size.
        matte: float32 [9, 3] of `matte_coefficients`.
        coarse: float32 [32, 64, 3], the panorama with few pixels.
    """

    name: str
    mirrors: NDArray[np.float16]
    matte: NDArray[np.float32]
    coarse: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class EnvironmentLight:
    """An environment that is turned about the y axis.

    Attributes:
        environment: The environment.
        yaw: Angle in radians. Light that comes from +z at 0 comes from +x at pi / 2.
    """

    environment: PreparedEnvironment
    yaw: float = 0.0


def prepare(environment: Environment) -> PreparedEnvironment:
    """Compute what shading looks up of an environment."""
    levels = blurred(np.minimum(environment.radiance, MAX_RADIANCE))
    coarse = environment.radiance
    while len(coarse) > 32:
        coarse = halved(coarse)
    return PreparedEnvironment(
        name=environment.name,
        mirrors=np.ascontiguousarray(
            np.stack([enlarged(level, len(levels[0])) for level in levels])
        ),
        matte=matte_coefficients(environment.radiance),
        coarse=coarse,
    )


@lru_cache(maxsize=64)
def prepared_environment(number: int, folder: Path | None = None) -> PreparedEnvironment:
    """Return environment `number` of a directory of HDR files, or of the computed ones for None.

    The result is kept in the directory CACHE, because preparing takes half a second.

    Raises:
        UserError: If an HDR file cannot be read.
    """
    code = "".join(sha256_of(Path(source)) for source in (environments.__file__, __file__))
    content = str(number) if folder is None else sha256_of(environment_files(folder)[number])
    path = CACHE / f"{hash_of([code, content])}.npz"
    if path.exists():
        try:
            with np.load(path) as arrays:
                return PreparedEnvironment(
                    name=str(arrays["name"]),
                    mirrors=arrays["mirrors"],
                    matte=arrays["matte"],
                    coarse=arrays["coarse"],
                )
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            log.warning("%s is damaged (%s). It is computed again.", path, error)
    prepared = prepare(environment(number, folder))
    try:
        with replacing(path, several_writers=True) as partial, partial.open("wb") as file:
            np.savez(file, **{name: getattr(prepared, name) for name in ARRAYS}, name=prepared.name)
    except OSError as error:
        log.warning("%s cannot be written (%s). Environments are computed again.", path, error)
    return prepared


@lru_cache(maxsize=1)
def reflected_shares() -> NDArray[np.float32]:
    """Return the table of the split sum: a rough mirror reflects F0 * scale + bias.

    Returns:
        float32 [TABLE_SIDE, TABLE_SIDE, 2] = (scale, bias). Row i is roughness
        i / (TABLE_SIDE - 1), column j is the cosine j / (TABLE_SIDE - 1) between normal and view.
        Their sum is the share that microfacets without absorption reflect in a single scattering.
    """
    even = np.linspace(0, 1, TABLE_SIDE)
    roughness, nv = even[:, None, None], np.maximum(even, 1e-3)[None, :, None]
    e = (np.arange(TABLE_SAMPLES) + 0.5) / TABLE_SAMPLES
    angle = 2 * pi * np.array([_radical_inverse(i) for i in range(TABLE_SAMPLES)])
    alpha2 = np.maximum(roughness, 1e-2) ** 4
    cos_h = np.sqrt((1 - e) / (1 + (alpha2 - 1) * e))
    sin_h = np.sqrt(1 - cos_h**2)
    vh = np.maximum(np.sqrt(1 - nv**2) * sin_h * np.cos(angle) + nv * cos_h, 0)
    nl = np.maximum(2 * vh * cos_h - nv, 0)
    smith = nl * np.sqrt(nv**2 * (1 - alpha2) + alpha2) + nv * np.sqrt(
        nl**2 * (1 - alpha2) + alpha2
    )
    weight = np.where(nl > 0, 2 * nl * nv / np.maximum(smith, 1e-9) * vh / (cos_h * nv), 0.0)
    fresnel = (1 - vh) ** 5
    table = np.stack(
        [(weight * (1 - fresnel)).mean(axis=2), (weight * fresnel).mean(axis=2)], axis=-1
    )
    # The sum of few samples exceeds 1 by up to 2% where it should be 1.
    return (table / np.maximum(table.sum(axis=-1, keepdims=True), 1)).astype(np.float32)


def matte_coefficients(panorama: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the light on matte surfaces as spherical harmonics of degrees 0 to 2.

    Returns:
        float32 [9, 3]. With `harmonics(n) @ coefficients` a white matte surface of normal n has
        that radiance. The coefficients are the least-squares fit over the sphere.
    """
    small = panorama
    while len(small) > 32:
        small = halved(small)
    normals = directions(16).reshape(-1, 3)
    weight = np.sqrt(np.repeat(np.sin((np.arange(16) + 0.5) * (pi / 16)), 32))[:, None]
    values = irradiance(small, normals)
    fit = np.linalg.lstsq(harmonics(normals) * weight, values * weight, rcond=None)[0]
    return fit.astype(np.float32)


def harmonics(n: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return 1, x, y, z, xy, yz, xz, 3z^2 - 1 and x^2 - y^2 of directions [N, 3], as [N, 9]."""
    x, y, z = n[:, 0], n[:, 1], n[:, 2]
    one = np.ones_like(x)
    return np.stack([one, x, y, z, x * y, y * z, x * z, 3 * z * z - 1, x * x - y * y], axis=1)
