"""Families of open sheets and of parts that are thinner than the spacing of a coarse grid."""

from __future__ import annotations

import numpy as np

from pipeline.sources.shapes import closed_solids, textures
from pipeline.sources.shapes.pieces import Paint, Piece
from pipeline.sources.shapes.primitives import extrude, lathe, surface
from pipeline.sources.shapes.textures import Rng


def flag(rng: Rng) -> list[Piece]:
    """A waving sheet on a pole."""
    u, v = np.linspace(0, 1, 49)[:, None], np.linspace(0, 1, 25)[None]
    waves = rng.uniform(1.0, 2.2)
    phase = rng.uniform(0, 6)
    z = 0.13 * u**0.7 * np.sin(2 * np.pi * (waves * u - 0.25 * v) + phase)
    cloth = surface(np.stack([1.1 * u + 0 * v, 0.75 + 0.7 * v - 0.08 * u, z], axis=-1))
    colors = textures.palette(rng)[:3]
    images = (
        textures.stripes(colors, 3),
        textures.stripes(colors, 3, upright=False),
        textures.checker(colors[0], colors[1], 6),
    )
    pole = closed_solids.rod(0.025, 20).placed_between((-0.01, -0.4, 0.0), (-0.01, 1.55, 0.0))
    knob = closed_solids.sphere(0.06, 24, 12).translated(x=-0.01, y=1.57)
    return [
        cloth.painted(Paint(texture=images[rng.integers(3)])),
        pole.painted(Paint(color=(0.75, 0.75, 0.78), metallic=0.5, roughness=0.4)),
        knob.painted(Paint(color=(0.85, 0.68, 0.2), metallic=0.5, roughness=0.4)),
    ]


def _quad(a: tuple, b: tuple, c: tuple, d: tuple, cells: int = 1) -> Piece:
    """Return the sheet with the corners a, b, c, d, counter-clockwise from the lower left."""
    u, v = np.linspace(0, 1, cells + 1)[:, None, None], np.linspace(0, 1, cells + 1)[None, :, None]
    p, q, r, s = (np.array(corner, dtype=np.float64) for corner in (a, b, c, d))
    return surface(p * (1 - u) * (1 - v) + q * u * (1 - v) + r * u * v + s * (1 - u) * v)


def open_box(rng: Rng) -> list[Piece]:
    """A cardboard box of single sheets with its four flaps open."""
    x, y, z = rng.uniform(0.3, 0.5), rng.uniform(0.4, 0.7), rng.uniform(0.3, 0.5)
    color = textures.from_hex(("c19a6b", "d4a373", "b08968")[rng.integers(3)])
    board = Paint(texture=textures.noise(rng, color, textures.shaded(color, 0.85)), tiles=1.0)
    corners = [(-x, z), (x, z), (x, -z), (-x, -z)]
    sheets = [_quad((-x, 0, -z), (x, 0, -z), (x, 0, z), (-x, 0, z))]
    for k in range(4):
        ax, az = corners[k]
        bx, bz = corners[(k + 1) % 4]
        sheets.append(_quad((ax, 0, az), (bx, 0, bz), (bx, y, bz), (ax, y, az)))
        out = np.array([(ax + bx) / 2, (az + bz) / 2])
        lean = out / np.linalg.norm(out) * 0.6 * min(x, z)
        rise = rng.uniform(-0.1, 0.15)
        flap = _quad(
            (ax, y, az),
            (bx, y, bz),
            (bx + lean[0], y + rise, bz + lean[1]),
            (ax + lean[0], y + rise, az + lean[1]),
        )
        sheets.append(flap)
    return [sheet.painted(board) for sheet in sheets]


def bowl(rng: Rng) -> list[Piece]:
    """A bowl of a single sheet."""
    angle = np.linspace(0, rng.uniform(0.36, 0.52) * np.pi, 25)
    profile = np.stack([np.sin(angle), 1 - np.cos(angle)], axis=1)
    profile[0, 0] = 0.0
    a, b, *_ = textures.palette(rng)
    ripples = int(rng.integers(0, 12))
    depth = rng.uniform(0.0, 0.08)
    sheet = lathe(profile, 96)
    around = np.arctan2(sheet.vertices[:, 0], sheet.vertices[:, 2])
    wave = 1 + depth * np.rint(1e6 * np.sin(ripples * around)) / 1e6 * sheet.vertices[:, 1]
    rim = Piece(vertices=sheet.vertices * wave[:, None], faces=sheet.faces, uv=sheet.uv)
    return [
        rim.painted(Paint(texture=textures.stripes([a, a, b], 12, upright=False), roughness=0.3))
    ]


def mobius(rng: Rng) -> list[Piece]:
    """A Moebius strip, a sheet with one side."""
    turns = int(rng.choice([1, 3]))
    t = np.linspace(0, 2 * np.pi, 193)[:, None]
    wide = rng.uniform(0.2, 0.4)
    w = np.linspace(-wide, wide, 13)[None]
    r = 1 + w * np.cos(turns * t / 2)
    points = np.stack([r * np.sin(t), w * np.sin(turns * t / 2), r * np.cos(t)], axis=-1)
    points[-1] = points[0, ::-1]
    a, b, c, *_ = (np.array(color) for color in textures.palette(rng))

    def color(p: np.ndarray) -> np.ndarray:
        t = np.arctan2(p[:, :1], p[:, 2:]) / np.pi
        return np.where(np.abs(t) < 1 / 3, a, np.where(t < 0, b, c))

    return [surface(points).rotated("x", 25).colored(color)]


def umbrella(rng: Rng) -> list[Piece]:
    ribs = int(rng.integers(6, 11))
    around = 2 * np.pi * np.arange(ribs * 8)[:, None] / (ribs * 8)
    down = np.linspace(1, 0, 17)[None]
    scallop = 1 - 0.09 * np.abs(np.sin(ribs * around / 2)) * down
    x, z = (
        np.where(down == 0, 0.0, down * scallop * wave) for wave in (np.sin(around), np.cos(around))
    )
    y = (
        rng.uniform(0.3, 0.5) * np.cos(np.pi / 2 * 0.95 * down)
        + 0.02 * np.abs(np.sin(ribs * around / 2)) * down
    )
    canopy = surface(np.stack([x, y, z], axis=-1), closed_u=True)
    colors = textures.palette(rng)[: int(rng.integers(2, 4))]
    bend = np.linspace(0, np.pi, 16)
    hook = np.stack([0.1 - 0.1 * np.cos(bend), -1.05 - 0.1 * np.sin(bend), 0 * bend], axis=1)
    path = np.concatenate(
        [np.stack([0 * bend, np.linspace(0.55, -1.0, 16), 0 * bend], axis=1), hook]
    )
    return [
        canopy.painted(Paint(texture=textures.stripes(colors, ribs))),
        closed_solids.tube(path, 0.02, 12).painted(Paint(color=(0.25, 0.16, 0.1))),
    ]


def paper_plane(rng: Rng) -> list[Piece]:
    """A paper plane of folded sheets that share one edge."""
    span = rng.uniform(0.35, 0.6)
    keel = rng.uniform(0.15, 0.28)
    lift = rng.uniform(0.0, 0.12)
    nose = (0.0, 0.0, 1.0)
    bottom = (0.0, -keel, -0.5)
    a, b, *_ = textures.palette(rng)
    paper = Paint(
        texture=textures.stripes([a, (0.97, 0.97, 0.95), (0.97, 0.97, 0.95), b], 8), tiles=0.8
    )
    sheets = []
    for side in (-1, 1):
        fold = (side * 0.04, 0.0, -0.6)
        wing = (side * span, lift, -0.65)
        sheets.append(np.array([nose, fold, wing]))
        sheets.append(np.array([nose, bottom, fold]))
    return [
        Piece(vertices=sheet.astype(np.float64), faces=np.array([[0, 1, 2]])).painted(paper)
        for sheet in sheets
    ]


def wireframe(rng: Rng) -> list[Piece]:
    """Thin rods along a polyhedron's edges, with a bead at each corner."""
    name = ("tetrahedron", "octahedron", "icosahedron", "cube")[rng.integers(4)]
    if name == "cube":
        corners = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * 0.6
        edges = {
            (i, j) for i in range(8) for j in range(i) if (corners[i] != corners[j]).sum() == 1
        }
    else:
        body = closed_solids.polyhedron(name)
        corners = body.vertices
        edges = {
            (max(f[i], f[i - 1]), min(f[i], f[i - 1]))
            for f in body.faces.tolist()
            for i in range(3)
        }
    radius = rng.uniform(0.012, 0.03)
    a, b, *_ = textures.palette(rng)
    rods = [
        closed_solids.rod(radius).placed_between(corners[i], corners[j]).painted(Paint(color=a))
        for i, j in sorted(edges)
    ]
    return rods + [
        closed_solids.sphere(radius * 2.5, 20, 10).translated(*corner).painted(Paint(color=b))
        for corner in corners
    ]


def fence(rng: Rng) -> list[Piece]:
    color = ((0.95, 0.95, 0.93), textures.pick(rng, textures.WOODS))[rng.integers(2)]
    wood = Paint(color=color)
    pickets = int(rng.integers(7, 13))
    gap = 0.16
    tall = rng.uniform(0.6, 0.9)
    wide = rng.uniform(0.06, 0.11)
    outline = [(-wide / 2, 0), (wide / 2, 0), (wide / 2, tall), (0, tall + 0.08), (-wide / 2, tall)]
    pieces = [
        extrude(outline, 0.02).translated(x=gap * (k - (pickets - 1) / 2)).painted(wood)
        for k in range(pickets)
    ]
    for y in (0.2, tall - 0.15):
        pieces.append(
            closed_solids.box(gap * pickets, 0.05, 0.02).translated(y=y, z=-0.02).painted(wood)
        )
    return pieces


def plates(rng: Rng) -> list[Piece]:
    """A stack of thin plates on a pin, like a cake stand."""
    colors = textures.palette(rng)
    count = int(rng.integers(3, 6))
    pieces = [
        closed_solids.cylinder(0.03, 0.36 * (count - 1) + 0.3, 20)
        .translated(y=0.18 * (count - 1) + 0.1)
        .painted(Paint(color=colors[4]))
    ]
    for k in range(count):
        radius = 0.8 * (1 - 0.6 * k / count)
        dish = [
            (0.0, 0.0),
            (radius * 0.7, 0.0),
            (radius, 0.06),
            (radius, 0.075),
            (radius * 0.69, 0.015),
            (0.0, 0.015),
        ]
        pieces.append(
            lathe(dish, 64)
            .translated(y=0.36 * k)
            .painted(Paint(color=colors[k % 4], roughness=0.2))
        )
    return pieces


def ladder(rng: Rng) -> list[Piece]:
    rungs = int(rng.integers(5, 10))
    tall = 1.6
    wide = rng.uniform(0.18, 0.26)
    paint = Paint(texture=textures.wood(rng, textures.pick(rng, textures.WOODS)))
    lean = rng.uniform(10, 25)
    pieces = [
        closed_solids.rod(0.03).placed_between((side * wide, 0, 0), (side * wide * 0.8, tall, 0))
        for side in (-1, 1)
    ]
    for k in range(rungs):
        y = tall * (k + 0.5) / rungs
        reach = wide * (1 - 0.2 * y / tall)
        pieces.append(closed_solids.rod(0.018).placed_between((-reach, y, 0), (reach, y, 0)))
    return [piece.rotated("x", -lean).painted(paint) for piece in pieces]


def spring(rng: Rng) -> list[Piece]:
    turns = rng.uniform(4, 8)
    wire = rng.uniform(0.025, 0.05)
    t = np.linspace(0, 2 * np.pi * turns, int(40 * turns))
    radius = 0.4 * (1 - rng.uniform(0, 0.5) * t / t[-1])
    path = np.stack([radius * np.sin(t), 1.2 * t / t[-1], radius * np.cos(t)], axis=1)
    a, b, *_ = (np.array(color) for color in textures.palette(rng))
    return [closed_solids.tube(path, wire, 12).colored(lambda p: a + (b - a) * p[:, 1:2] / 1.2)]
