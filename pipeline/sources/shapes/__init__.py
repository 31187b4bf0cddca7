"""The embedded shapes: a kit of surfaces, textures, a GLB writer, and families of shapes built from them."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.sources.shapes import basic
from pipeline.sources.shapes.glb import to_glb
from pipeline.sources.shapes.kit import Piece
from pipeline.sources.shapes.textures import Rng

__all__ = ["FAMILIES", "to_glb"]

FAMILIES: dict[str, Callable[[Rng], list[Piece]]] = {
    "crate": basic.crate,
    "ball": basic.ball,
    "barrel": basic.barrel,
    "torus": basic.torus,
    "supershape": basic.supershape,
    "vase": basic.vase,
    "star": basic.star,
    "torus_knot": basic.torus_knot,
}
