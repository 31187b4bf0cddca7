"""Families of shapes that consist of one or a few closed solids."""

from __future__ import annotations

import numpy as np

from pipeline.sources.shapes import closed_solids, textures
from pipeline.sources.shapes.pieces import Paint, Piece
from pipeline.sources.shapes.primitives import extrude, lathe, ring
from pipeline.sources.shapes.textures import Rng

# Counter-clockwise outlines, five units high.
LETTERS: dict[str, list[tuple[float, float]]] = {
    "E": [
        (0, 0),
        (3, 0),
        (3, 1),
        (1, 1),
        (1, 2),
        (2.5, 2),
        (2.5, 3),
        (1, 3),
        (1, 4),
        (3, 4),
        (3, 5),
        (0, 5),
    ],
    "F": [(0, 0), (1, 0), (1, 2), (2.5, 2), (2.5, 3), (1, 3), (1, 4), (3, 4), (3, 5), (0, 5)],
    "H": [
        (0, 0),
        (1, 0),
        (1, 2),
        (2, 2),
        (2, 0),
        (3, 0),
        (3, 5),
        (2, 5),
        (2, 3),
        (1, 3),
        (1, 5),
        (0, 5),
    ],
    "K": [
        (0, 0),
        (1, 0),
        (1, 1.8),
        (2, 0),
        (3.1, 0),
        (1.8, 2.5),
        (3.1, 5),
        (2, 5),
        (1, 3.2),
        (1, 5),
        (0, 5),
    ],
    "L": [(0, 0), (3, 0), (3, 1), (1, 1), (1, 5), (0, 5)],
    "M": [
        (0, 0),
        (1, 0),
        (1, 3),
        (2, 1.5),
        (3, 3),
        (3, 0),
        (4, 0),
        (4, 5),
        (3, 5),
        (2, 3.2),
        (1, 5),
        (0, 5),
    ],
    "N": [(0, 0), (1, 0), (1, 2.8), (2, 0), (3, 0), (3, 5), (2, 5), (2, 2.2), (1, 5), (0, 5)],
    "T": [(1, 0), (2, 0), (2, 4), (3, 4), (3, 5), (0, 5), (0, 4), (1, 4)],
    "U": [(0, 0), (3, 0), (3, 5), (2, 5), (2, 1), (1, 1), (1, 5), (0, 5)],
    "V": [(1, 0), (2, 0), (3, 5), (2, 5), (1.5, 1.8), (1, 5), (0, 5)],
    "X": [
        (0, 0),
        (1, 0),
        (1.5, 1.6),
        (2, 0),
        (3, 0),
        (2, 2.5),
        (3, 5),
        (2, 5),
        (1.5, 3.4),
        (1, 5),
        (0, 5),
        (1, 2.5),
    ],
    "Y": [(1, 0), (2, 0), (2, 2.2), (3, 5), (2, 5), (1.5, 3.2), (1, 5), (0, 5), (1, 2.2)],
    "Z": [(0, 0), (3, 0), (3, 1), (1.2, 1), (3, 4), (3, 5), (0, 5), (0, 4), (1.8, 4), (0, 1)],
}


ICINGS = ("ff8fab", "5e3023", "fff1e6", "80ed99", "a2d2ff", "b5179e")


def crate(rng: Rng) -> list[Piece]:
    a, b, *_ = textures.palette(rng)
    x, y, z = rng.uniform(0.5, 1.0, 3)
    return [
        closed_solids.box(x, y, z).painted(
            Paint(texture=textures.checker(a, b, int(rng.integers(2, 7))))
        )
    ]


def ball(rng: Rng) -> list[Piece]:
    image = textures.stripes(
        textures.palette(rng)[: rng.integers(2, 5)], int(rng.integers(2, 4)) * 4
    )
    tilted = closed_solids.sphere(1.0).rotated("x", rng.uniform(-40, 40))
    return [tilted.painted(Paint(texture=image, roughness=0.4))]


def barrel(rng: Rng) -> list[Piece]:
    y = np.linspace(-0.6, 0.6, 17)
    bulge = rng.uniform(0.05, 0.14)

    def radius(height: np.ndarray) -> np.ndarray:
        return 0.38 + bulge * (1 - (height / 0.6) ** 2)

    image = textures.wood(rng, textures.pick(rng, textures.WOODS))
    body = lathe([(0.0, -0.6), *np.stack([radius(y), y], axis=1), (0.0, 0.6)])
    iron = Paint(color=textures.pick(rng, textures.METALS), metallic=0.6, roughness=0.5)
    hoops = []
    for height in (-0.42, -0.2, 0.2, 0.42):
        low, high = radius(np.array([height - 0.035, height + 0.035])).tolist()
        section = [
            (low - 0.03, -0.035),
            (low + 0.015, -0.035),
            (high + 0.015, 0.035),
            (high - 0.03, 0.035),
        ]
        hoops.append(lathe(section, closed=True).translated(y=height).painted(iron))
    return [body.painted(Paint(texture=image)), *hoops]


def torus(rng: Rng) -> list[Piece]:
    """A doughnut with icing: one closed surface with vertex colours."""
    dough = np.array(textures.from_hex("c68642"))
    icing = np.array(textures.pick(rng, ICINGS))
    waves = rng.integers(5, 11)
    phase = rng.uniform(0, 6)
    tube = rng.uniform(0.28, 0.45)

    def color(p: np.ndarray) -> np.ndarray:
        edge = 0.06 * np.sin(waves * np.arctan2(p[:, 2], p[:, 0]) + phase)
        return np.where((p[:, 1] > edge)[:, None], icing, dough)

    return [closed_solids.torus(1.0, tube, 128, 48).colored(color)]


def supershape(rng: Rng) -> list[Piece]:
    m = int(rng.integers(3, 9)), int(rng.integers(2, 7))
    n = float(rng.uniform(0.35, 0.8)), float(rng.uniform(0.8, 1.6)), float(rng.uniform(0.8, 1.6))
    a, b, *_ = (np.array(color) for color in textures.palette(rng))
    body = closed_solids.supershape(m, n)
    far = np.linalg.norm(body.vertices, axis=1).max()
    return [body.colored(lambda p: a + (b - a) * np.linalg.norm(p, axis=1, keepdims=True) / far)]


def vase(rng: Rng) -> list[Piece]:
    """A vase with a thick wall. Its profile continues over the lip to the inside."""
    t = np.linspace(0, 1, 40)
    radius = (
        0.28 + 0.12 * np.sin(2 * np.pi * t * rng.uniform(0.6, 1.2) + rng.uniform(0, 6)) + 0.05 * t
    )
    outer = np.stack([radius, t], axis=1)
    inner = (outer - np.array([0.035, 0.0]))[:2:-1]
    profile = np.concatenate([[(0.0, 0.0)], outer, inner, [(0.0, inner[-1, 1])]])
    a, b, *_ = textures.palette(rng)
    image = (
        textures.gradient(a, b),
        textures.noise(rng, a, b),
        textures.stripes([a, b], 12, upright=False),
    )
    return [lathe(profile, 64).painted(Paint(texture=image[rng.integers(3)], roughness=0.3))]


def star(rng: Rng) -> list[Piece]:
    points = int(rng.integers(4, 9))
    angle = np.pi * np.arange(2 * points) / points + np.pi / 2
    radius = np.where(np.arange(2 * points) % 2 == 0, 1.0, rng.uniform(0.35, 0.6))
    outline = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    gold = Paint(color=textures.palette(rng)[0], metallic=0.3, roughness=0.4)
    return [extrude(outline, rng.uniform(0.2, 0.5)).painted(gold)]


def torus_knot(rng: Rng) -> list[Piece]:
    p, q = ((2, 3), (3, 2), (2, 5), (3, 4), (3, 5), (5, 2))[rng.integers(6)]
    t = 2 * np.pi * np.arange(300) / 300
    r = 1 + 0.45 * np.cos(q * t)
    path = np.stack([r * np.cos(p * t), r * np.sin(p * t), 0.45 * np.sin(q * t)], axis=1)
    wire = closed_solids.tube(path, rng.uniform(0.1, 0.17), 16, closed=True)
    a, b, *_ = (np.array(color) for color in textures.palette(rng))
    return [wire.colored(lambda x: a + (b - a) * (0.5 + 0.5 * np.sin(3 * x[:, :1])))]


def gear(rng: Rng) -> list[Piece]:
    teeth = int(rng.integers(8, 21))
    depth = rng.uniform(0.12, 0.2)
    shape = np.array([1 - depth, 1 - depth, 1.0, 1.0])
    at = (np.arange(teeth)[:, None] + np.array([0.0, 0.45, 0.58, 0.87])) / teeth
    angle = 2 * np.pi * at.ravel()
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    wheel = ring(
        np.tile(shape, teeth)[:, None] * circle,
        rng.uniform(0.2, 0.5) * circle,
        rng.uniform(0.2, 0.4),
    )
    return [
        wheel.painted(
            Paint(color=textures.pick(rng, textures.METALS), metallic=0.7, roughness=0.45)
        )
    ]


def letter(rng: Rng) -> list[Piece]:
    outline = LETTERS[sorted(LETTERS)[rng.integers(len(LETTERS))]]
    a, b, *_ = textures.palette(rng)
    return [
        extrude(outline, rng.uniform(0.8, 1.6)).painted(
            Paint(texture=textures.dots(a, b, 2), tiles=0.5)
        )
    ]


def gem(rng: Rng) -> list[Piece]:
    name = ("tetrahedron", "octahedron", "icosahedron", "cut")[rng.integers(4)]
    color = textures.palette(rng)[0]
    if name == "cut":  # a brilliant: table, crown, girdle and pavilion
        n = int(rng.integers(6, 11))
        top = closed_solids.circle(0.55, n)
        middle = closed_solids.circle(1.0, 2 * n)
        rows = [np.column_stack([top[:, 0], np.full(n, 0.4), top[:, 1]])]
        rows += [
            np.column_stack([middle[:, 0], np.full(2 * n, y), middle[:, 1]]) for y in (0.05, 0.0)
        ]
        body = closed_solids.hull(np.concatenate([*rows, [[0.0, -0.85, 0.0]]]))
    else:
        body = closed_solids.polyhedron(name).scaled(1.0, rng.uniform(1.0, 1.6), 1.0)
    return [body.painted(Paint(color=color, roughness=0.15))]


def pill(rng: Rng) -> list[Piece]:
    a, b, *_ = textures.palette(rng)
    length = rng.uniform(0.8, 2.0)
    body = closed_solids.capsule(0.5, length).rotated("z", rng.uniform(-60, 60))
    return [body.painted(Paint(texture=textures.stripes([a, b], 2, upright=False), roughness=0.25))]


def heart(rng: Rng) -> list[Piece]:
    t = 2 * np.pi * np.arange(72) / 72
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    outline = np.stack([-x, y], axis=1) / 16
    bulge = rng.uniform(0.25, 0.5)
    slope = np.linspace(-np.pi / 2, np.pi / 2, 15)
    centre = np.array([0.0, 0.1])
    flat = centre + (outline - centre)[:, None] * np.cos(slope)[None, :, None]
    flat[:, [0, -1]] = centre
    depth = np.broadcast_to(bulge * np.sin(slope), flat.shape[:2])
    body = closed_solids.patch(np.concatenate([flat, depth[..., None]], axis=-1))
    return [body.painted(Paint(color=textures.palette(rng)[0], roughness=0.3))]


def pawn(rng: Rng) -> list[Piece]:
    """A chess pawn, a surface of revolution."""
    ball_ = np.linspace(-0.9, np.pi / 2, 16)
    head = np.stack([0.17 * np.cos(ball_), 0.95 + 0.17 * np.sin(ball_)], axis=1)
    head[-1, 0] = 0.0
    neck = np.linspace(0, 1, 10)[:, None]
    body = np.concatenate([0.3 - 0.19 * neck**0.6, 0.18 + 0.5 * neck], axis=1)
    base = [(0.0, 0.0), (0.38, 0.0), (0.38, 0.06), (0.33, 0.09), (0.35, 0.14), (0.3, 0.18)]
    collar = [(0.2, 0.7), (0.2, 0.74), (0.1, 0.79)]
    profile = np.concatenate([base, body[1:], collar, head])
    sides = ("f4f1de", "d8c9a3"), ("2b2d42", "4a4e69"), ("7f1d1d", "b23a48"), ("6f4518", "a0703c")
    a, b = (textures.from_hex(text) for text in sides[rng.integers(4)])
    paint = Paint(texture=textures.noise(rng, a, b), roughness=0.35)
    return [lathe(profile, 56).scaled(1.0, rng.uniform(0.9, 1.25), 1.0).painted(paint)]


def bottle(rng: Rng) -> list[Piece]:
    body = rng.uniform(0.24, 0.32)
    neck = rng.uniform(0.07, 0.1)
    t = np.linspace(0, 1, 14)
    shoulder = np.stack(
        [neck + (body - neck) * (0.5 + 0.5 * np.cos(np.pi * t)), 0.7 + 0.25 * t], axis=1
    )
    profile = [(0.0, 0.04), (body * 0.7, 0.0), (body, 0.05), *shoulder, (neck, 1.2), (0.0, 1.2)]
    cap = closed_solids.cylinder(neck * 1.25, 0.1).translated(y=1.2)
    colors = textures.palette(rng)
    label = [(body + 0.008, 0.2), (body + 0.008, 0.55), (body - 0.02, 0.55), (body - 0.02, 0.2)]
    return [
        lathe(profile).painted(Paint(color=colors[0], roughness=0.15)),
        cap.painted(Paint(color=colors[1])),
        lathe(label, closed=True).painted(
            Paint(texture=textures.stripes(colors[2:], 6, upright=False))
        ),
    ]


def pebble(rng: Rng) -> list[Piece]:
    """A stone: a sphere displaced by a few waves."""
    base = closed_solids.sphere(1.0, 96, 48)
    directions = rng.normal(size=(8, 3))
    phases = rng.uniform(0, 6, 8)
    height = 1 + 0.07 * np.sin(2.2 * base.vertices @ directions.T + phases).sum(axis=1) / 2
    stone = Piece(vertices=base.vertices * height[:, None], faces=base.faces, uv=base.uv)
    a, b, *_ = (np.array(color) for color in textures.palette(rng))
    flat = stone.scaled(1.0, rng.uniform(0.6, 1.0), rng.uniform(0.7, 1.0))
    return [
        flat.colored(lambda p: a + (b - a) * (0.5 + 0.5 * np.sin(9 * p @ directions[0]))[:, None])
    ]
