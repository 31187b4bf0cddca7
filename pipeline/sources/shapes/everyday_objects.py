"""Families of everyday objects and plants. Most consist of several overlapping solids."""

from __future__ import annotations

import numpy as np

from pipeline.sources.shapes import closed_solids, textures
from pipeline.sources.shapes.pieces import Paint, Piece
from pipeline.sources.shapes.primitives import lathe
from pipeline.sources.shapes.textures import Rng


def tree(rng: Rng) -> list[Piece]:
    bark = Paint(texture=textures.wood(rng, textures.from_hex("6f4518")))
    trunk = lathe([(0.0, 0.0), (0.16, 0.0), (0.1, 0.15), (0.07, 0.9), (0.0, 0.9)], 24)
    dark, light = (
        np.array(textures.from_hex(text))
        for text in (("1b4332", "52b788"), ("606c38", "a3b18a"))[rng.integers(2)]
    )
    pieces = [trunk.painted(bark)]
    if rng.random() < 0.5:  # a conifer
        for k in range(layers := int(rng.integers(3, 6))):
            wide = 0.55 * (1 - k / (layers + 0.8))
            skirt = lathe([(0.0, 0.06), (wide, 0.0), (wide * 0.94, 0.04), (0.0, 0.5)], 40)
            green = 0.8 * dark + 0.2 * light * k / layers
            pieces.append(
                skirt.translated(y=0.35 + 0.27 * k).painted(Paint(color=tuple(green.tolist())))
            )
    else:
        for _ in range(int(rng.integers(5, 9))):
            blob = closed_solids.sphere(rng.uniform(0.22, 0.36), 40, 20)
            at = rng.uniform((-0.3, 0.85, -0.3), (0.3, 1.35, 0.3))
            crown = blob.translated(*at)
            pieces.append(
                crown.colored(lambda p: dark + (light - dark) * ((p[:, 1:2] - 0.6) / 1.1))
            )
    return pieces


def mug(rng: Rng) -> list[Piece]:
    """A cup with a thick wall, a handle that overlaps the wall, and coffee."""
    tall = rng.uniform(0.8, 1.2)
    wall = 0.06
    bottom = rng.uniform(0.34, 0.42)
    top = rng.uniform(0.4, 0.5)
    cup = [
        (0.0, 0.0),
        (bottom - 0.03, 0.0),
        (bottom, 0.03),
        (top, tall - 0.02),
        (top - wall / 2, tall),
    ]
    cup += [(top - wall, tall - 0.02), (bottom - wall, wall), (0.0, wall)]
    a, b, c, *_ = textures.palette(rng)
    image = (textures.stripes([a, b], 8), textures.dots(a, c, 6), textures.checker(a, b, 12))[
        rng.integers(3)
    ]
    bend = np.linspace(-0.5 * np.pi, 0.5 * np.pi, 28)[:, None]
    reach = rng.uniform(0.2, 0.3)
    middle = tall / 2
    path = np.hstack(
        [
            (top + bottom) / 2 - 0.04 + reach * np.cos(bend),
            middle + 0.3 * tall * np.sin(bend),
            0 * bend,
        ]
    )
    coffee = closed_solids.cylinder(top - wall * 0.8, 0.02).translated(y=tall * 0.8)
    return [
        lathe(cup, 64).painted(Paint(texture=image, roughness=0.3)),
        closed_solids.tube(path, 0.05, 16).painted(Paint(color=b, roughness=0.3)),
        coffee.painted(Paint(color=(0.2, 0.1, 0.05), roughness=0.1)),
    ]


def snowman(rng: Rng) -> list[Piece]:
    snow = Paint(color=(0.94, 0.96, 0.98))
    coal = Paint(color=(0.08, 0.08, 0.08))
    scarf, hat, *_ = textures.palette(rng)
    sizes = rng.uniform((0.42, 0.3, 0.2), (0.5, 0.35, 0.24))
    heights = np.array(
        [0.0, 0.62 * (sizes[0] + sizes[1]), 0.62 * (sizes[0] + 2 * sizes[1] + sizes[2])]
    )
    pieces = [
        closed_solids.sphere(r).translated(y=y).painted(snow)
        for r, y in zip(sizes, heights, strict=True)
    ]
    face = heights[2]
    radius = sizes[2]
    for x in (-0.08, 0.08):
        pieces.append(
            closed_solids.sphere(0.03, 16, 8)
            .translated(x=x, y=face + 0.06, z=radius * 0.92)
            .painted(coal)
        )
    for k in range(3):
        pieces.append(
            closed_solids.sphere(0.035, 16, 8)
            .translated(
                y=heights[1] + 0.12 * (k - 1),
                z=sizes[1] * 0.98,
            )
            .painted(coal)
        )
    nose = lathe([(0.0, 0.0), (0.045, 0.0), (0.0, 1.0)], 20).placed_between(
        (0, face, radius * 0.8),
        (0, face, radius + 0.25),
    )
    pieces.append(nose.painted(Paint(color=(0.95, 0.45, 0.1))))
    pieces.append(
        closed_solids.torus(radius * 0.8, 0.06, 48, 16)
        .translated(y=face - radius * 0.75)
        .painted(Paint(color=scarf))
    )
    brim = [(0.0, 0.0), (0.27, 0.0), (0.27, 0.03), (0.17, 0.03), (0.16, 0.3), (0.0, 0.3)]
    pieces.append(lathe(brim).translated(y=face + radius * 0.8).painted(Paint(color=hat)))
    for side in (-1, 1):
        shoulder = np.array([side * sizes[1] * 0.9, heights[1] + 0.08, 0.0])
        hand = shoulder + np.array([side * 0.4, rng.uniform(0.0, 0.35), 0.1])
        pieces.append(
            closed_solids.rod(0.02)
            .placed_between(shoulder, hand)
            .painted(Paint(color=(0.35, 0.22, 0.1)))
        )
    return pieces


def castle(rng: Rng) -> list[Piece]:
    stone = textures.from_hex(("adb5bd", "c9b79c", "a5a58d")[rng.integers(3)])
    wall = Paint(texture=textures.bricks(rng, stone, textures.shaded(stone, 0.7)), tiles=2.0)
    roof = Paint(color=textures.palette(rng)[0])
    keep = rng.uniform(0.55, 0.8)
    tall = rng.uniform(0.5, 0.8)
    pieces = [_block(2 * keep, 0.4, 2 * keep, y=0.2).painted(wall)]
    pieces.append(_block(keep * 0.8, tall, keep * 0.8, y=tall / 2).painted(wall))
    for x in np.linspace(-keep, keep, 7)[1:-1]:
        for sign in (-1, 1):
            pieces.append(_block(0.1, 0.1, 0.08, x=x, y=0.45, z=sign * (keep - 0.04)).painted(wall))
            pieces.append(_block(0.08, 0.1, 0.1, x=sign * (keep - 0.04), y=0.45, z=x).painted(wall))
    for sx in (-1, 1):
        for sz in (-1, 1):
            tower = lathe(
                [(0.0, 0.0), (0.2, 0.0), (0.18, tall * 0.9), (0.22, tall), (0.0, tall)], 32
            )
            pieces.append(
                Piece(vertices=tower.vertices, faces=tower.faces)
                .translated(sx * keep, 0, sz * keep)
                .painted(wall)
            )
            cone = lathe([(0.0, 0.0), (0.26, 0.0), (0.0, 0.42)], 32)
            pieces.append(cone.translated(sx * keep, tall - 0.01, sz * keep).painted(roof))
    pyramid = lathe([(0.0, 0.0), (keep * 0.62, 0.0), (0.0, 0.4)], 4).rotated("y", 45)
    gate = _block(0.22, 0.28, 0.06, y=0.14, z=keep)
    return [
        *pieces,
        pyramid.translated(y=tall - 0.01).painted(roof),
        gate.painted(Paint(color=(0.3, 0.18, 0.1))),
    ]


def _block(
    x_side: float, y_side: float, z_side: float, x: float = 0.0, y: float = 0.0, z: float = 0.0
) -> Piece:
    side = closed_solids.box(x_side, y_side, z_side)
    return Piece(vertices=side.vertices, faces=side.faces).translated(x, y, z)


def mushroom(rng: Rng) -> list[Piece]:
    """A cap with spots as vertex colours, and a stalk."""
    angle = np.linspace(0, np.pi / 2, 24)
    wide = rng.uniform(0.5, 0.75)
    tall = rng.uniform(0.35, 0.5)
    over = np.stack([wide * np.cos(angle), 0.6 + tall * np.sin(angle)], axis=1)
    over[-1, 0] = 0.0
    cap = lathe([(0.0, 0.62), (wide * 0.9, 0.57), *over], 96)
    base = np.array(textures.palette(rng)[0])
    spot = np.array([0.98, 0.96, 0.9])
    centres = rng.normal(size=(14, 3)) * [1, 0.6, 1] + [0, 0.5, 0]
    centres = centres / np.linalg.norm(centres, axis=1, keepdims=True)

    def color(p: np.ndarray) -> np.ndarray:
        q = (p - [0, 0.6, 0]) / [wide, tall, wide]
        near = (q @ centres.T).max(axis=1) > 0.985
        return np.where((near | (p[:, 1] < 0.595))[:, None], spot, base)

    stalk = [(0.0, 0.0), (0.22, 0.0), (0.2, 0.1), (0.13, 0.35), (0.14, 0.63), (0.0, 0.63)]
    return [cap.colored(color), lathe(stalk).painted(Paint(color=(0.93, 0.88, 0.78)))]


def bookshelf(rng: Rng) -> list[Piece]:
    wood = Paint(texture=textures.wood(rng, textures.pick(rng, textures.WOODS)))
    floors = int(rng.integers(2, 5))
    wide = rng.uniform(0.7, 1.0)
    deep = 0.26
    tall = floors * 0.36
    pieces = [_block(wide, tall, 0.02, y=tall / 2, z=-deep / 2).painted(wood)]
    for side in (-1, 1):
        pieces.append(_block(0.04, tall + 0.04, deep, x=side * wide / 2, y=tall / 2).painted(wood))
    for k in range(floors + 1):
        pieces.append(_block(wide + 0.01, 0.035, deep, y=k * 0.36).painted(wood))
    colors = textures.palette(rng) + textures.palette(rng)
    for k in range(floors):
        x = -wide / 2 + 0.04
        while x < wide / 2 - 0.12:
            thick = rng.uniform(0.035, 0.07)
            high = rng.uniform(0.2, 0.29)
            if rng.random() < 0.85:
                book = _block(
                    thick, high, 0.18, x=x + thick / 2, y=k * 0.36 + 0.0175 + high / 2, z=0.01
                )
                pieces.append(book.painted(Paint(color=colors[rng.integers(len(colors))])))
            x += thick + 0.004
    return pieces


def dumbbell(rng: Rng) -> list[Piece]:
    iron = Paint(color=textures.pick(rng, textures.METALS), metallic=0.7, roughness=0.4)
    plates = Paint(color=textures.palette(rng)[0], roughness=0.6)
    pieces = [closed_solids.cylinder(0.06, 1.5).rotated("z", 90).painted(iron)]
    for side in (-1, 1):
        for k in range(count := int(rng.integers(1, 4))):
            radius = 0.4 - 0.08 * k
            edge = [
                (0.0, -0.05),
                (radius - 0.02, -0.05),
                (radius, -0.03),
                (radius, 0.03),
                (radius - 0.02, 0.05),
            ]
            disc = lathe([*edge, (0.0, 0.05)], 56).rotated("z", 90)
            pieces.append(disc.translated(x=side * (0.45 + 0.11 * k)).painted(plates))
        pieces.append(
            closed_solids.cylinder(0.09, 0.06, 6)
            .rotated("z", 90)
            .translated(x=side * (0.5 + 0.11 * count))
            .painted(iron)
        )
    return pieces
