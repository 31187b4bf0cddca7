"""Surface-like token sets for benchmarks: voxels of spheres, tori, slabs and rods."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels import token_order

Points = NDArray[np.float64]
Shape = tuple[float, Callable[[int, np.random.Generator], Points]]
"""Surface area, and a function that draws points on the surface."""

DENSITY = 60
"""Samples per voxel of area. Few touched voxels are missed."""


def _rotation(rng: np.random.Generator) -> Points:
    return np.linalg.qr(rng.normal(size=(3, 3)))[0]


def _sphere(center: Points, radius: float) -> Shape:
    def sample(n: int, rng: np.random.Generator) -> Points:
        direction = rng.normal(size=(n, 3))
        return center + radius * direction / np.linalg.norm(direction, axis=1, keepdims=True)

    return 4 * np.pi * radius**2, sample


def _torus(center: Points, ring: float, tube: float, turn: Points) -> Shape:
    def sample(n: int, rng: np.random.Generator) -> Points:
        u, v = rng.uniform(0, 2 * np.pi, (2, 2 * n))
        # Rejection sampling: the outer side of the torus has more area.
        accepted = rng.uniform(0, ring + tube, 2 * n) < ring + tube * np.cos(v)
        u, v = u[accepted], v[accepted]
        distance = ring + tube * np.cos(v)
        points = np.stack([distance * np.cos(u), distance * np.sin(u), tube * np.sin(v)], 1)
        return center + points @ turn.T

    return 4 * np.pi**2 * ring * tube, sample


def _slab(center: Points, half: Points, turn: Points) -> Shape:
    areas = 8 * np.array([half[1] * half[2], half[0] * half[2], half[0] * half[1]])

    def sample(n: int, rng: np.random.Generator) -> Points:
        points = rng.uniform(-1, 1, (n, 3))
        axis = rng.choice(3, n, p=areas / areas.sum())
        points[np.arange(n), axis] = np.sign(points[np.arange(n), axis])
        return center + points * half @ turn.T

    return float(areas.sum()), sample


def _rod(center: Points, radius: float, length: float, turn: Points) -> Shape:
    def sample(n: int, rng: np.random.Generator) -> Points:
        angle, z = rng.uniform(0, 2 * np.pi, n), rng.uniform(-length / 2, length / 2, n)
        return center + np.stack([radius * np.cos(angle), radius * np.sin(angle), z], 1) @ turn.T

    return 2 * np.pi * radius * length, sample


def _scene(extra: int, rng: np.random.Generator) -> list[Shape]:
    """A sphere, a torus, two slabs, eight rods, and `extra` smaller parts."""
    middle = np.full(3, 0.5)
    shapes = [
        _sphere(middle + np.array([-0.12, -0.1, 0.05]), 0.2),
        _torus(middle + np.array([0.12, 0.1, -0.05]), 0.2, 0.07, _rotation(rng)),
        _slab(middle + np.array([0, 0, -0.3]), np.array([0.33, 0.33, 0.012]), np.eye(3)),
        _slab(middle + np.array([0.05, -0.05, 0.28]), np.array([0.16, 0.22, 0.03]), _rotation(rng)),
    ]
    for _ in range(8):
        center = middle + rng.uniform(-0.28, 0.28, 3)
        shapes.append(
            _rod(center, rng.uniform(0.006, 0.014), rng.uniform(0.25, 0.5), _rotation(rng))
        )
    for i in range(extra):
        center = middle + rng.uniform(-0.33, 0.33, 3)
        if i % 3 == 0:
            shapes.append(_sphere(center, rng.uniform(0.04, 0.15)))
        elif i % 3 == 1:
            shapes.append(
                _torus(center, rng.uniform(0.06, 0.14), rng.uniform(0.015, 0.04), _rotation(rng))
            )
        else:
            half = rng.uniform([0.02, 0.05, 0.005], [0.1, 0.15, 0.02])
            shapes.append(_slab(center, half, _rotation(rng)))
    return shapes


def _voxels(shapes: list[Shape], grid: int, scale: float, seed: int) -> NDArray[np.int64]:
    """Codes of the voxels within a quarter of a voxel of the shapes.

    The shapes are scaled about the middle of the unit cube.
    """
    rng = np.random.default_rng(seed)
    codes = []
    for area, sample in shapes:
        points = (sample(int(area * (scale * grid) ** 2 * DENSITY) + 500, rng) - 0.5) * scale + 0.5
        offset = rng.normal(size=points.shape)
        offset *= rng.uniform(0, 0.25 / grid, (len(points), 1)) / np.linalg.norm(
            offset, axis=1, keepdims=True
        )
        voxel = np.floor((points + offset) * grid).astype(np.int64)
        voxel = voxel[((voxel >= 0) & (voxel < grid)).all(1)]
        codes.append(np.unique(voxel @ np.array([grid * grid, grid, 1])))
    return np.unique(np.concatenate(codes))


def surface_coords(tokens: int, grid: int, seed: int = 0) -> Tensor:
    """Return the voxels of a surface-like scene in token order.

    Args:
        tokens: Wanted number of voxels. The result is within 1% of it.
        grid: Voxels per side of the grid.
        seed: Seed of the scene.

    Returns:
        int32 [N, 4] = (batch 0, x, y, z).
    """
    # The more surface the grid must hold, the more parts the scene needs.
    crowding = tokens / grid**2
    shapes = _scene(
        0 if crowding < 2.3 else 6 if crowding < 4.5 else 70, np.random.default_rng(100 + seed)
    )
    scale = 0.8
    for _ in range(12):
        codes = _voxels(shapes, grid, scale, seed)
        if abs(len(codes) - tokens) <= 0.01 * tokens:
            break
        scale = float(np.clip(scale * (tokens / len(codes)) ** 0.5, 0.2, 1.5))
    xyz = np.stack([codes // grid**2, codes // grid % grid, codes % grid], 1)
    coords = torch.from_numpy(np.concatenate([np.zeros((len(xyz), 1)), xyz], 1).astype(np.int32))
    return coords[token_order(coords)]
