"""Families of single solids."""

from __future__ import annotations

import numpy as np

from pipeline.sources.shapes import solids, textures
from pipeline.sources.shapes.kit import Paint, Piece, colored, extrude, lathe, painted, scaled
from pipeline.sources.shapes.textures import Rng


def crate(rng: Rng) -> list[Piece]:
    a, b, *_ = textures.palette(rng)
    x, y, z = rng.uniform(0.5, 1.0, 3)
    return [painted(solids.box(x, y, z), Paint(texture=textures.checker(a, b, int(rng.integers(2, 7)))))]


def ball(rng: Rng) -> list[Piece]:
    image = textures.stripes(textures.palette(rng)[: rng.integers(2, 5)], int(rng.integers(1, 4)) * 4)
    return [painted(solids.sphere(1.0), Paint(texture=image, roughness=0.4))]


def barrel(rng: Rng) -> list[Piece]:
    y = np.linspace(-0.6, 0.6, 17)
    belly = 0.38 + rng.uniform(0.05, 0.14) * (1 - (y / 0.6) ** 2)
    image = textures.wood(rng, textures.pick(rng, textures.WOODS))
    profile = np.concatenate([[(0.0, -0.6)], np.stack([belly, y], axis=1), [(0.0, 0.6)]])
    return [painted(lathe(profile), Paint(texture=image))]


def torus(rng: Rng) -> list[Piece]:
    ring = solids.torus(1.0, rng.uniform(0.15, 0.45))
    a, b, c, *_ = (np.array(color) for color in textures.palette(rng))

    def rainbow(p):
        t = (np.arctan2(p[:, 2], p[:, 0]) / np.pi)[:, None]
        return np.where(np.sin(6 * np.pi * t) > 0, a * (1 - t * t) + b * t * t, c)

    return [colored(ring, rainbow)]


def supershape(rng: Rng) -> list[Piece]:
    m = tuple(int(k) for k in rng.integers(2, 9, 2))
    n = tuple(float(k) for k in rng.uniform(0.7, 3.0, 3))
    color = textures.palette(rng)[0]
    return [painted(scaled(solids.supershape(m, n), 1.0), Paint(color=color, roughness=0.5))]


def vase(rng: Rng) -> list[Piece]:
    t = np.linspace(0, 1, 40)
    radius = 0.25 + 0.12 * np.sin(2 * np.pi * t * rng.uniform(0.6, 1.2) + rng.uniform(0, 6)) + 0.05 * t
    profile = np.concatenate([[(0.0, 0.0)], np.stack([radius, t], axis=1), [(0.0, 1.0)]])
    a, b, *_ = textures.palette(rng)
    return [painted(lathe(profile), Paint(texture=textures.gradient(a, b), roughness=0.3))]


def star(rng: Rng) -> list[Piece]:
    points = int(rng.integers(4, 9))
    angle = np.pi * np.arange(2 * points) / points + np.pi / 2
    radius = np.where(np.arange(2 * points) % 2 == 0, 1.0, rng.uniform(0.35, 0.6))
    outline = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return [painted(extrude(outline, rng.uniform(0.2, 0.5)), Paint(color=textures.palette(rng)[0]))]


def torus_knot(rng: Rng) -> list[Piece]:
    p, q = ((2, 3), (3, 2), (2, 5), (3, 4), (3, 5), (5, 2))[rng.integers(6)]
    t = 2 * np.pi * np.arange(240) / 240
    r = 1 + 0.45 * np.cos(q * t)
    path = np.stack([r * np.cos(p * t), r * np.sin(p * t), 0.45 * np.sin(q * t)], axis=1)
    wire = solids.tube(path, rng.uniform(0.1, 0.17), 16, closed=True)
    a, b, *_ = (np.array(color) for color in textures.palette(rng))
    return [colored(wire, lambda x: a + (b - a) * (0.5 + 0.5 * np.sin(3 * x[:, :1])))]
