"""Families assembled from overlapping solids: furniture, vehicles, buildings and figures."""

from __future__ import annotations

import numpy as np

from pipeline.sources.shapes import closed_solids, textures
from pipeline.sources.shapes.pieces import Paint, Piece
from pipeline.sources.shapes.primitives import extrude, lathe, surface
from pipeline.sources.shapes.textures import Rng


def _wood(rng: Rng, tiles: float = 1.0) -> Paint:
    return Paint(texture=textures.wood(rng, textures.pick(rng, textures.WOODS)), tiles=tiles)


def _metal(rng: Rng) -> Paint:
    return Paint(color=textures.pick(rng, textures.METALS), metallic=0.6, roughness=0.4)


def _plain(piece: Piece) -> Piece:
    """Return a piece without uv, so that its texture has the same scale on all sides."""
    return Piece(vertices=piece.vertices, faces=piece.faces)


def table(rng: Rng) -> list[Piece]:
    height = rng.uniform(0.5, 0.8)
    wood = _wood(rng)
    round_top = rng.random() < 0.4
    x, z = rng.uniform(0.8, 1.3), rng.uniform(0.6, 0.8)
    top = _plain(
        closed_solids.cylinder(x / 2, 0.06, 64) if round_top else closed_solids.box(x, 0.06, z)
    )
    reach = (x / 2 * 0.6, x / 2 * 0.6) if round_top else (x / 2 - 0.07, z / 2 - 0.07)
    leg = lathe([(0.0, -height), (0.03, -height), (0.045, 0.0), (0.0, 0.0)], 16)
    legs = [leg.translated(x=sx * reach[0], z=sz * reach[1]) for sx in (-1, 1) for sz in (-1, 1)]
    return [top.painted(wood), *(leg.painted(_wood(rng)) for leg in legs)]


def chair(rng: Rng) -> list[Piece]:
    wood = _wood(rng)
    a, b, *_ = textures.palette(rng)
    cushion = Paint(texture=textures.dots(a, b, 6), tiles=1.5)
    tall = rng.uniform(0.5, 0.75)
    legs = rng.uniform(0.38, 0.5)
    pieces = [_plain(closed_solids.box(0.5, 0.05, 0.5)).painted(wood)]
    pieces.append(_plain(closed_solids.box(0.44, 0.06, 0.44)).translated(y=0.05).painted(cushion))
    for sx in (-0.21, 0.21):
        pieces.append(
            _plain(closed_solids.box(0.05, legs, 0.05))
            .translated(x=sx, y=-legs / 2, z=0.21)
            .painted(wood)
        )
        back = _plain(closed_solids.box(0.05, legs + tall, 0.05)).translated(
            x=sx, y=(tall - legs) / 2, z=-0.22
        )
        pieces.append(back.painted(wood))
    for k in range(rails := int(rng.integers(2, 5))):
        rail = _plain(closed_solids.box(0.4, 0.07, 0.03)).translated(
            y=tall * (k + 1) / rails - 0.06, z=-0.22
        )
        pieces.append(rail.painted(wood))
    return pieces


def lamp(rng: Rng) -> list[Piece]:
    """A floor lamp. Its shade is an open sheet."""
    colors = textures.palette(rng)
    metal = _metal(rng)
    height = rng.uniform(0.8, 1.2)
    wide = rng.uniform(0.28, 0.4)
    foot = lathe([(0.0, 0.0), (0.26, 0.0), (0.24, 0.04), (0.05, 0.08), (0.0, 0.08)])
    shade = lathe([(wide, height - 0.2), (wide * rng.uniform(0.4, 0.8), height + 0.15)], 64)
    return [
        foot.painted(metal),
        closed_solids.cylinder(0.025, height, 20).translated(y=height / 2).painted(metal),
        shade.painted(Paint(texture=textures.stripes(colors[:2], 24))),
        closed_solids.sphere(0.09, 24, 12)
        .translated(y=height)
        .painted(Paint(color=(1.0, 0.95, 0.75))),
    ]


def robot(rng: Rng) -> list[Piece]:
    shell, joint, eyes, light, *_ = textures.palette(rng)
    body = Paint(color=shell, metallic=0.3, roughness=0.4)
    dark = Paint(color=joint, metallic=0.4, roughness=0.5)
    wide = rng.uniform(0.45, 0.65)
    tall = rng.uniform(0.5, 0.7)
    pieces = [
        closed_solids.box(wide, tall, 0.35).painted(body),
        closed_solids.box(wide * 0.7, 0.32, 0.32).translated(y=tall / 2 + 0.24).painted(body),
        closed_solids.cylinder(0.08, 0.16).translated(y=tall / 2 + 0.04).painted(dark),
        closed_solids.cylinder(0.012, 0.2, 12).translated(y=tall / 2 + 0.48).painted(dark),
        closed_solids.sphere(0.04, 20, 10)
        .translated(y=tall / 2 + 0.58)
        .painted(Paint(color=light)),
        closed_solids.box(wide * 0.6, tall * 0.35, 0.04)
        .translated(y=0.05, z=0.18)
        .painted(Paint(color=light)),
    ]
    for side in (-1, 1):
        eye = closed_solids.cylinder(0.06, 0.05, 24).rotated("x", 90)
        pieces.append(
            eye.translated(x=side * wide * 0.17, y=tall / 2 + 0.27, z=0.17).painted(
                Paint(color=eyes)
            )
        )
        lift = rng.uniform(-10, 70)
        arm = closed_solids.capsule(0.06, 0.38, 24).translated(y=-0.22).rotated("z", side * lift)
        pieces.append(arm.translated(x=side * (wide / 2 + 0.06), y=tall / 2 - 0.1).painted(dark))
        pieces.append(
            closed_solids.sphere(0.1, 24, 12)
            .translated(x=side * (wide / 2 + 0.05), y=tall / 2 - 0.1)
            .painted(body)
        )
        leg = closed_solids.cylinder(0.08, 0.4, 24).translated(
            x=side * wide * 0.27, y=-tall / 2 - 0.18
        )
        foot = closed_solids.box(0.2, 0.1, 0.32).translated(
            x=side * wide * 0.27, y=-tall / 2 - 0.4, z=0.05
        )
        pieces += [leg.painted(dark), foot.painted(body)]
    return pieces


def car(rng: Rng) -> list[Piece]:
    """A car that faces +x. Body and cabin are extruded outlines of the side."""
    color = textures.palette(rng)[0]
    glass = Paint(color=(0.15, 0.2, 0.28), roughness=0.1)
    roof = rng.uniform(0.5, 0.7)
    nose = rng.uniform(0.5, 0.75)
    side = [(-1, 0.1), (1, 0.1), (1.02, 0.28), (nose, 0.38), (-0.95, 0.4), (-1.02, 0.3)]
    cabin = [(-0.85, 0.36), (nose - 0.05, 0.36), (nose - 0.35, roof), (-0.6, roof)]
    inset = [(-0.78, 0.4), (nose - 0.14, 0.4), (nose - 0.38, roof - 0.04), (-0.57, roof - 0.04)]
    paint = Paint(color=color, metallic=0.2, roughness=0.25)
    pieces = [
        extrude(side, 0.8).painted(paint),
        extrude(cabin, 0.68).painted(paint),
        extrude(inset, 0.7).painted(glass),
    ]
    tyre = Paint(color=(0.08, 0.08, 0.09), roughness=0.9)
    hub = _metal(rng)
    for x in (-0.6, 0.6):
        for z in (-0.38, 0.38):
            wheel = closed_solids.cylinder(0.2, 0.14, 40).rotated("x", 90)
            pieces.append(wheel.translated(x=x, y=0.12, z=z).painted(tyre))
            cap = closed_solids.cylinder(0.11, 0.16, 24).rotated("x", 90)
            pieces.append(cap.translated(x=x, y=0.12, z=z).painted(hub))
    for z in (-0.27, 0.27):
        lamp_ = closed_solids.sphere(0.07, 20, 10).scaled(0.5, 0.8, 1.3)
        pieces.append(lamp_.translated(x=1.0, y=0.26, z=z).painted(Paint(color=(1.0, 0.95, 0.7))))
        pieces.append(lamp_.translated(x=-1.01, y=0.28, z=z).painted(Paint(color=(0.8, 0.1, 0.08))))
    return pieces


def house(rng: Rng) -> list[Piece]:
    wall, mortar, roof, door, frame = textures.palette(rng)
    wide, tall, deep = rng.uniform((0.8, 0.5, 0.7), (1.1, 0.8, 1.2))
    gable = rng.uniform(0.3, 0.55)
    outline = [
        (-wide / 2, 0),
        (wide / 2, 0),
        (wide / 2, tall),
        (0, tall + gable),
        (-wide / 2, tall),
    ]
    pieces = [
        extrude(outline, deep).painted(Paint(texture=textures.bricks(rng, wall, mortar), tiles=1.6))
    ]
    slope = float(np.degrees(np.arctan2(gable, wide / 2)))
    length = float(np.hypot(gable, wide / 2)) + 0.14
    tiles = Paint(texture=textures.bricks(rng, roof, textures.shaded(roof, 0.6)), tiles=2.0)
    for side in (-1, 1):
        plate = _plain(closed_solids.box(length, 0.05, deep + 0.16)).rotated("z", -side * slope)
        lift = np.array([side * np.sin(np.radians(slope)), np.cos(np.radians(slope))]) * 0.02
        at = np.array([side * wide / 4, tall + gable / 2]) + lift
        slip = 0.05 * np.array([side * np.cos(np.radians(slope)), -np.sin(np.radians(slope))])
        pieces.append(plate.translated(*(at + slip)).painted(tiles))
    pieces.append(
        _plain(closed_solids.box(0.18, 0.36, 0.03))
        .translated(y=0.18, z=deep / 2)
        .painted(Paint(color=door))
    )
    for x in (-wide * 0.3, wide * 0.3):
        for z in (-deep / 2, deep / 2):
            window = closed_solids.box(0.16, 0.18, 0.04).translated(x=x, y=tall * 0.6, z=z)
            pieces.append(
                window.painted(Paint(texture=textures.checker(frame, (0.65, 0.8, 0.9), 4)))
            )
    chimney = _plain(closed_solids.box(0.13, gable + 0.2, 0.13)).translated(
        x=wide * 0.25, y=tall + gable / 2 + 0.1
    )
    return [
        *pieces,
        chimney.painted(Paint(texture=textures.bricks(rng, (0.6, 0.25, 0.2), mortar), tiles=3.0)),
    ]


def rocket(rng: Rng) -> list[Piece]:
    hull, fins, window, *_ = textures.palette(rng)
    t = np.linspace(0, 1, 24)
    belly = rng.uniform(0.2, 0.3)
    profile = np.stack([belly * (1 - t**2.4) * (0.75 + 0.9 * t * (1 - t)), 1.6 * t], axis=1)
    profile[-1, 0] = 0.0
    pieces = [
        lathe([(0.0, 0.0), *profile], 56).painted(
            Paint(texture=textures.stripes([hull, (1, 1, 1)], 4, upright=False))
        )
    ]
    fin = extrude([(0.1, 0.0), (0.45, -0.22), (0.47, 0.02), (0.12, 0.5)], 0.05)
    for k in range(count := int(rng.integers(3, 5))):
        pieces.append(fin.rotated("y", 360 * k / count + 45).painted(Paint(color=fins)))
    nozzle = lathe([(0.0, -0.12), (0.17, -0.12), (0.1, 0.05), (0.0, 0.05)])
    pieces.append(nozzle.painted(_metal(rng)))
    glass = closed_solids.torus(0.09, 0.03, 40, 16).rotated("x", 90)
    pieces.append(glass.translated(y=0.95, z=belly * 0.82).painted(_metal(rng)))
    pieces.append(
        closed_solids.sphere(0.09, 24, 12)
        .translated(y=0.95, z=belly * 0.77)
        .painted(Paint(color=window, roughness=0.1))
    )
    return pieces


def airplane(rng: Rng) -> list[Piece]:
    """An airplane that faces +z."""
    body, wing, tail, *_ = textures.palette(rng)
    fuselage = closed_solids.capsule(0.14, 1.2).rotated("x", 90).scaled(1.0, 1.05, 1.0)
    span = rng.uniform(0.7, 1.0)
    sweep = rng.uniform(0.0, 0.4)
    pieces = [
        fuselage.painted(
            Paint(texture=textures.stripes([body, body, body, (1, 1, 1)], 8), roughness=0.3)
        )
    ]
    for side in (-1, 1):
        outline = [
            (0.0, -0.2),
            (side * span, -0.12 - sweep),
            (side * span, 0.06 - sweep),
            (0.0, 0.25),
        ]
        blade = extrude(outline[::side], 0.035).rotated("x", 90)  # the outline's y axis becomes z
        pieces.append(blade.translated(z=0.1).painted(Paint(color=wing)))
        pieces.append(blade.scaled(0.4, 1.0, 0.5).translated(z=-0.62).painted(Paint(color=tail)))
        engine = closed_solids.capsule(0.06, 0.2, 24).rotated("x", 90)
        pieces.append(
            engine.translated(x=side * span * 0.45, y=-0.07, z=0.12 - sweep * 0.4).painted(
                Paint(color=tail)
            )
        )
    fin = extrude([(0.5, 0.05), (0.72, 0.05), (0.78, 0.4), (0.66, 0.4)], 0.035).rotated("y", 90)
    return [*pieces, fin.painted(Paint(color=tail))]


def boat(rng: Rng) -> list[Piece]:
    """A sailing boat with a closed hull, a mast, and sails that are open sheets."""
    hull, deck, cloth, *_ = textures.palette(rng)
    t, s = np.linspace(-1, 1, 33)[:, None], np.linspace(-1, 1, 15)[None]
    beam = 0.32 * np.sqrt(np.maximum(1 - np.abs(t) ** 2.5, 0.0))
    depth = 0.3 * np.sqrt(np.maximum(1 - np.abs(t) ** 4, 0.0))
    x, y, z = t + 0 * s, -depth * np.cos(np.pi / 2 * s) + 0.12 * t**2, beam * np.sin(np.pi / 2 * s)
    below = surface(np.stack([x, y, z], axis=-1))
    lid = surface(np.stack([x[:, [-1, 0]], y[:, [-1, 0]], z[:, [-1, 0]]], axis=-1))
    tall = rng.uniform(0.9, 1.3)
    mast = closed_solids.rod(0.025).placed_between((0.0, -0.1, 0.0), (0.0, tall, 0.0))
    pieces = [
        below.painted(Paint(color=hull)),
        lid.painted(Paint(color=deck)),
        mast.painted(_wood(rng)),
    ]
    u, v = np.linspace(0, 1, 21)[:, None], np.linspace(0, 1, 21)[None]
    for reach, low in ((-0.8, 0.12), (0.75, 0.15)):
        width = reach * (1 - v) * u
        bulge = 0.15 * np.sin(np.pi * u) * np.sin(np.pi * (0.15 + 0.8 * v)) * (1 - v)
        points = np.stack(
            [0.03 * np.sign(reach) + width, low + (tall - low - 0.03) * v + 0 * u, bulge], axis=-1
        )
        pieces.append(
            surface(points).painted(
                Paint(texture=textures.stripes([cloth, (1, 1, 1)], 6, upright=False))
            )
        )
    return pieces
