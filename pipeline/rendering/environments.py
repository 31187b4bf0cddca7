"""Environments: light from all directions. Studios and skies that are computed, and HDR files.

A panorama is float32 [height, 2 * height, 3] of linear radiance. Row 0 is the zenith (+y). Column
0 begins at -z, and columns go from -z over -x, +z (the middle) and +x back to -z.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import pi
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import UserError
from pipeline.core.hashing import seed_of, sha256_of

HEIGHT = 256  # rows of a panorama; HDR files are resized to it
STUDIOS, SKIES = 10, 6  # numbers of computed environments
SUFFIXES = (".exr", ".hdr")
KEY_LEVEL = 0.75  # mean radiance of a white matte surface, over the directions that cameras see
MAX_SIDE = 16_384  # of an HDR file


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Light from all directions.

    Attributes:
        name: Name of the environment, such as "studio-03".
        radiance: float32 [HEIGHT, 2 * HEIGHT, 3], linear, exposed by `exposed`.
    """

    name: str
    radiance: NDArray[np.float32]


def directions(height: int) -> NDArray[np.float32]:
    """Return the unit directions of the pixel centres of a panorama, float32 [h, 2 * h, 3]."""
    polar = (np.arange(height) + 0.5) * (pi / height)
    azimuth = (np.arange(2 * height) + 0.5) * (pi / height) - pi
    x = np.sin(polar)[:, None] * np.sin(azimuth)
    y = np.broadcast_to(np.cos(polar)[:, None], x.shape)
    z = np.sin(polar)[:, None] * np.cos(azimuth)
    return np.stack([x, y, z], axis=-1).astype(np.float32)


def solid_angles(height: int) -> NDArray[np.float64]:
    """Return the solid angle of the pixels of each row of a panorama, float64 [height]."""
    edges = np.cos(np.arange(height + 1) * (pi / height))
    return (edges[:-1] - edges[1:]) * (pi / height)


def halved(panorama: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return a panorama of half the height. Pixels are weighted by their solid angles."""
    height = len(panorama)
    weight = solid_angles(height)[:, None, None]
    pairs = (panorama * weight).reshape(height // 2, 2, height, 2, 3).sum(axis=(1, 3))
    total = 2 * weight.reshape(height // 2, 2).sum(axis=1)[:, None, None]
    return (pairs / total).astype(np.float32)


def irradiance(panorama: NDArray[np.floating], normals: NDArray[np.floating]) -> NDArray:
    """Integrate the light on surfaces by a sum over all pixels.

    Args:
        panorama: [h, 2 * h, 3].
        normals: [N, 3] unit normals.

    Returns:
        float64 [N, 3], irradiance divided by pi: the radiance of a white matte surface.
    """
    height = len(panorama)
    light = panorama * solid_angles(height)[:, None, None] / pi
    cosine = normals @ directions(height).reshape(-1, 3).T
    return np.maximum(cosine, 0) @ light.reshape(-1, 3).astype(np.float64)


def exposed(panorama: NDArray[np.floating]) -> NDArray[np.float32]:
    """Scale a panorama so that white matte surfaces have the mean luminance KEY_LEVEL.

    The mean is over the normals that look sideways or up. A panorama without light is returned as
    it is.
    """
    small = np.asarray(panorama, np.float32)
    while len(small) > 16:
        small = halved(small)
    normals = directions(8).reshape(-1, 3)
    normals = normals[normals[:, 1] > -0.3]
    level = float((irradiance(small, normals) @ LUMINANCE).mean())
    return (panorama * (KEY_LEVEL / level if level > 0 else 1.0)).astype(np.float32)


LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


def _soft_step(low: float, high: float, x: NDArray) -> NDArray:
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _tint(rng: np.random.Generator, strength: float) -> NDArray[np.float64]:
    """Return a colour of luminance 1 between bluish and reddish white."""
    warmth = rng.uniform(-strength, strength)
    color = np.array([1 + warmth, 1.0, 1 - warmth])
    return color / (color @ LUMINANCE)


def _toward(azimuth_degrees: float, elevation_degrees: float) -> NDArray[np.float64]:
    azimuth, elevation = np.radians([azimuth_degrees, elevation_degrees])
    return np.array(
        [
            np.cos(elevation) * np.sin(azimuth),
            np.sin(elevation),
            np.cos(elevation) * np.cos(azimuth),
        ]
    )


def studio(seed: int) -> NDArray[np.float32]:
    """Compute a photo studio: a room with a floor, a bright key panel, and two to four others.

    Args:
        seed: Seed of the panels and of the room.

    Returns:
        Linear radiance, float32 [HEIGHT, 2 * HEIGHT, 3].
    """
    rng = np.random.default_rng(seed_of("studio", seed))
    d = directions(HEIGHT)
    wall, floor = rng.uniform(0.12, 0.45), rng.uniform(0.08, 0.40)
    up = _soft_step(-0.35, 0.10, d[..., 1])  # the floor bends up into the wall
    room = floor + (wall - floor) * up + rng.uniform(0.0, 0.25) * _soft_step(0.3, 1.0, d[..., 1])
    light = room[..., None] * _tint(rng, 0.04)
    key_side = rng.uniform(-70, 70)
    panels = [(key_side, rng.uniform(25, 60), rng.uniform(0.35, 0.65), rng.uniform(7, 16))]
    for _ in range(rng.integers(2, 5)):
        panels.append(
            (
                key_side + rng.uniform(60, 300),
                rng.uniform(-5, 75),
                rng.uniform(0.15, 0.5),
                rng.uniform(1.5, 7),
            )
        )
    for azimuth, elevation, size, level in panels:
        # a rectangle on a plane at distance 1, turned by a random angle, with soft borders
        axis = _toward(azimuth, elevation)
        right = np.cross([0.0, 1.0, 0.0], axis)
        right /= max(float(np.linalg.norm(right)), 1e-6)
        above = np.cross(axis, right)
        turn, aspect = rng.uniform(-0.3, 0.3), rng.uniform(0.45, 1.0)
        right, above = (
            right * np.cos(turn) + above * np.sin(turn),
            above * np.cos(turn) - right * np.sin(turn),
        )
        ahead = np.maximum(d @ axis, 1e-3)
        u, v = np.abs(d @ right) / ahead / size, np.abs(d @ above) / ahead / (size * aspect)
        border = rng.uniform(0.08, 0.25)
        inside = (1 - _soft_step(1 - border, 1, u)) * (1 - _soft_step(1 - border, 1, v))
        inside = inside * (d @ axis > 0) * (1 - 0.35 * np.minimum(u * u + v * v, 1))
        light = light + (level * inside)[..., None] * _tint(rng, 0.12)
    return exposed(light)


def sky(seed: int) -> NDArray[np.float32]:
    """Compute a sky with a sun, clouds and a ground.

    Args:
        seed: Seed of the sun's place, the haze, the clouds and the ground.

    Returns:
        Linear radiance, float32 [HEIGHT, 2 * HEIGHT, 3].
    """
    rng = np.random.default_rng(seed_of("sky", seed))
    d = directions(HEIGHT).astype(np.float64)
    sun = _toward(rng.uniform(-90, 90), rng.uniform(15, 65))
    haze, low = rng.uniform(0.1, 0.9), 1 - sun[1]
    zenith = np.array([0.18, 0.34, 0.75]) * (1 - 0.6 * haze) + 0.6 * haze * np.array([0.6] * 3)
    horizon = np.array([0.80, 0.88, 1.0]) + low**2 * np.array([0.25, -0.02, -0.35])
    height = np.clip(d[..., 1], 0, 1)[..., None]
    light = horizon + (zenith - horizon) * height**0.45
    # clouds: smooth noise on a plane above, fading to the horizon
    plane = d[..., [0, 2]] / np.maximum(d[..., 1:2], 0.12)
    density = np.zeros(d.shape[:2])
    for octave in range(5):
        frequency = 0.7 * 2**octave
        for _ in range(3):
            wave, phase = rng.normal(size=2), rng.uniform(0, 2 * pi)
            density += np.cos(frequency * (plane @ wave) + phase) / 3 / 1.7**octave
    cover = _soft_step(rng.uniform(-0.2, 0.6), 1.4, density) * _soft_step(0.02, 0.3, d[..., 1])
    cloud = (0.75 + 0.5 * _soft_step(-0.2, 1.0, d @ sun))[..., None] * np.array([1.0, 0.98, 0.96])
    light = light + cover[..., None] * (cloud - light)
    # the sun: a disc that haze makes wider, and its glow
    color = np.array([1.0, 0.93 - 0.25 * low**2, 0.80 - 0.50 * low**2])
    angle = np.degrees(np.arccos(np.clip(d @ sun, -1, 1)))
    width = 2.0 + 3.0 * haze
    disc = (1 - _soft_step(0.6 * width, 1.4 * width, angle)) * rng.uniform(60, 130) * (4 / width**2)
    glow = 0.6 * np.exp(-angle / 12)
    light = light + (disc + glow)[..., None] * color
    ground = rng.uniform(0.10, 0.35) * np.array([1.0, 0.93, 0.82]) * (0.6 + 0.8 * sun[1])
    above = _soft_step(-0.04, 0.01, d[..., 1])[..., None]
    return exposed(ground + (light - ground) * above)


def computed_environment(number: int) -> Environment:
    """Compute environment `number`, 0 to STUDIOS + SKIES - 1: first studios, then skies."""
    if number < STUDIOS:
        return Environment(name=f"studio-{number:02d}", radiance=studio(number))
    return Environment(name=f"sky-{number - STUDIOS:02d}", radiance=sky(number - STUDIOS))


def environment_files(folder: Path) -> list[Path]:
    """Return the HDR files of a directory, sorted by name.

    Raises:
        UserError: If `folder` is not a directory or has no file with one of SUFFIXES.
    """
    if not folder.is_dir():
        raise UserError(f"--render.environment must be a directory of HDR files, got {folder}")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{folder} has no {' or '.join(SUFFIXES)} file; put HDR panoramas there")
    return files


def describe_environments(folder: Path) -> tuple[str, ...]:
    """Return the name and sha256 of each HDR file of a directory, for the options of a product.

    Raises:
        UserError: If there is none.
    """
    return tuple(f"{path.name} {sha256_of(path)}" for path in environment_files(folder))


def read_environment(path: Path) -> Environment:
    """Read a panorama from an HDR file, resize it to HEIGHT rows and expose it.

    Negative values count as 0.

    Args:
        path: A .hdr or .exr file, twice as wide as high, in linear Rec. 709 colours.

    Raises:
        UserError: If the file cannot be read, has another shape, or values that are not finite.
    """
    import OpenImageIO as oiio

    image = oiio.ImageInput.open(str(path))
    if image is None:
        raise UserError(f"{path} cannot be read as an HDR file: {oiio.geterror()}")
    try:
        spec = image.spec()
        if spec.width != 2 * spec.height or spec.width > MAX_SIDE or spec.nchannels < 3:
            raise UserError(
                f"{path} must be an RGB panorama that is twice as wide as high and at most "
                f"{MAX_SIDE} pixels wide, it is {spec.width} x {spec.height} with "
                f"{spec.nchannels} channels"
            )
        pixels = image.read_image(0, 0, 0, 3, oiio.FLOAT)
        if pixels is None:
            raise UserError(f"{path} cannot be read as an HDR file: {image.geterror()}")
    finally:
        image.close()
    pixels = np.asarray(pixels, np.float32)
    if not np.isfinite(pixels).all():
        raise UserError(f"{path} has values that are not finite; save it again without them")
    return Environment(name=path.stem, radiance=exposed(_resized(np.maximum(pixels, 0), HEIGHT)))


def _resized(panorama: NDArray[np.float32], height: int) -> NDArray[np.float32]:
    """Resize a panorama by averaging over areas, which keeps the energy of a small sun."""
    for axis, size in ((0, height), (1, 2 * height)):
        have = panorama.shape[axis]
        edges = np.linspace(0, have, size + 1)
        total = np.concatenate(
            [np.zeros_like(panorama.take([0], axis)), panorama.cumsum(axis, dtype=np.float64)], axis
        )
        low = np.minimum(edges.astype(int), have - 1)
        part = (edges - low).reshape([-1 if a == axis else 1 for a in range(3)])
        at_edges = total.take(low, axis) + part * panorama.take(low, axis)
        panorama = (np.diff(at_edges, axis=axis) * (size / have)).astype(np.float32)
    return panorama


@lru_cache(maxsize=64)
def environment(number: int, folder: Path | None = None) -> Environment:
    """Return environment `number` of a directory of HDR files, or of the computed ones for None.

    Raises:
        UserError: If the file cannot be read.
    """
    if folder is None:
        return computed_environment(number)
    return read_environment(environment_files(folder)[number])


def count_environments(folder: Path | None) -> int:
    """Return the number of environments of a directory, or of the computed ones for None.

    Raises:
        UserError: If the directory has none.
    """
    return STUDIOS + SKIES if folder is None else len(environment_files(folder))
