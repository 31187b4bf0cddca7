"""Families with misleading faces: nested shells, and inverted, flipped or doubled faces."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipeline.sources.shapes import basic, closed_solids, furniture_and_parts, textures
from pipeline.sources.shapes.pieces import Paint, Piece
from pipeline.sources.shapes.primitives import ring
from pipeline.sources.shapes.textures import Rng


def nested_spheres(rng: Rng) -> list[Piece]:
    """A ball with hidden balls inside. Only the outermost one is visible."""
    a, b, c, *_ = textures.palette(rng)
    outer = closed_solids.sphere(1.0, 64, 32).painted(
        Paint(texture=textures.noise(rng, a, b), roughness=0.3)
    )
    inner = [
        closed_solids.sphere(rng.uniform(0.15, 0.35), 32, 16).translated(
            *rng.uniform(-0.35, 0.35, 3)
        )
        for _ in range(2)
    ]
    inner.append(closed_solids.sphere(0.85, 48, 24).flipped())
    return [outer, *(ball.painted(Paint(color=c)) for ball in inner)]


def thick_box(rng: Rng) -> list[Piece]:
    """A square tube with thick walls and a solid box inside."""
    a, b, c, *_ = textures.palette(rng)
    wall = rng.uniform(0.06, 0.2)
    tall = rng.uniform(0.7, 1.4)
    square = np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]) * 0.5
    tube = ring(square, square * (1 - 2 * wall), tall)
    upright = replace(
        tube,
        vertices=np.stack([tube.vertices[:, 0], tube.vertices[:, 2], -tube.vertices[:, 1]], axis=1),
        uv=None,
    )
    inside = closed_solids.box(0.3, tall * rng.uniform(0.6, 1.3), 0.3).translated(y=0.1)
    floor = closed_solids.box(0.99, 0.08, 0.99).translated(y=-tall / 2 + 0.04)
    paint = Paint(texture=textures.checker(a, b, 4), tiles=1.0)
    return [
        upright.painted(paint),
        floor.painted(Paint(color=b)),
        inside.painted(Paint(color=c)),
    ]


def inside_out(rng: Rng) -> list[Piece]:
    """A closed shape with all faces reversed."""
    shape = (basic.pawn, basic.gear, basic.vase, furniture_and_parts.car)[rng.integers(4)](rng)
    return [piece.flipped() for piece in shape]


def shuffled(rng: Rng) -> list[Piece]:
    """A closed shape with a random half of its faces reversed."""
    shape = (basic.supershape, basic.torus_knot, basic.bottle, furniture_and_parts.rocket)[
        rng.integers(4)
    ](rng)
    return [_with_flips(piece, rng) for piece in shape]


def _with_flips(piece: Piece, rng: Rng) -> Piece:
    reversed_faces = rng.random(len(piece.faces)) < 0.5
    faces = np.where(reversed_faces[:, None], piece.faces[:, ::-1], piece.faces)
    return replace(piece, faces=faces)


def doubled(rng: Rng) -> list[Piece]:
    """A closed shape that contains each face twice, once reversed."""
    shape = (basic.pebble, basic.star, basic.heart, furniture_and_parts.chair)[rng.integers(4)](rng)
    return [
        replace(piece, faces=np.concatenate([piece.faces, piece.faces[:, ::-1]])) for piece in shape
    ]
