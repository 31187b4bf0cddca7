"""The embedded shapes: primitives, textures, a GLB writer and families of seeded shapes."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.sources.shapes import basic, everyday_objects, furniture_and_parts, nested, thin
from pipeline.sources.shapes.glb import to_glb
from pipeline.sources.shapes.pieces import Piece
from pipeline.sources.shapes.textures import Rng

__all__ = ["FAMILIES", "to_glb"]

Family = Callable[[Rng], list[Piece]]

# Kinds of shapes alternate, so that a short build is a varied one. The order decides the names and
# therefore the uids of all shapes: a change here makes another data set.
FAMILIES: dict[str, Family] = {
    family.__name__: family
    for family in (
        basic.torus_knot,
        furniture_and_parts.chair,
        thin.flag,
        basic.supershape,
        everyday_objects.mug,
        nested.nested_spheres,
        furniture_and_parts.robot,
        basic.vase,
        thin.wireframe,
        furniture_and_parts.car,
        basic.gear,
        everyday_objects.tree,
        thin.bowl,
        basic.letter,
        furniture_and_parts.house,
        nested.inside_out,
        basic.torus,
        furniture_and_parts.table,
        thin.open_box,
        basic.pawn,
        furniture_and_parts.rocket,
        basic.gem,
        everyday_objects.mushroom,
        thin.fence,
        basic.crate,
        furniture_and_parts.lamp,
        nested.shuffled,
        basic.star,
        everyday_objects.castle,
        thin.mobius,
        basic.bottle,
        furniture_and_parts.airplane,
        basic.pebble,
        thin.umbrella,
        everyday_objects.snowman,
        nested.thick_box,
        basic.heart,
        furniture_and_parts.boat,
        thin.ladder,
        basic.barrel,
        everyday_objects.bookshelf,
        thin.plates,
        basic.ball,
        nested.doubled,
        thin.spring,
        basic.pill,
        everyday_objects.dumbbell,
        thin.paper_plane,
    )
}
