"""The sampling grid of the SDF: cell size, spacing and width of the narrow band at a resolution."""

from __future__ import annotations

CELL_SIDE = 8  # grid points along one side of a cell; one cell is one latent token


def check_resolution(resolution: int, name: str = "resolution") -> int:
    """Return `resolution` unchanged if it is valid.

    Args:
        resolution: Number of grid points along one side.
        name: What the message of the error calls it.

    Raises:
        ValueError: If `resolution` is not a positive multiple of 8.
    """
    if resolution <= 0 or resolution % CELL_SIDE:
        raise ValueError(f"{name} must be a positive multiple of {CELL_SIDE}, got {resolution}")
    return resolution


def spacing(resolution: int) -> float:
    """Return the distance between neighbouring grid points, in units of the cube's side.

    Grid point i lies at -0.5 + i * spacing(resolution), for i = 0 .. resolution - 1.

    Raises:
        ValueError: If `resolution` is not a positive multiple of 8.
    """
    return 1.0 / (check_resolution(resolution) - 1)


def band(resolution: int) -> float:
    """Return the truncation distance tau of the narrow band, in units of the cube's side.

    A grid point is active where |sdf| < tau. tau is 2/R at R = 256, 3/R at 384 and 4/R from 512 on.

    Raises:
        ValueError: If `resolution` is not a positive multiple of 8.
    """
    return min(max(resolution / 128, 2.0), 4.0) / check_resolution(resolution)
