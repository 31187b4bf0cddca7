"""The embedded shapes: a kit of surfaces, textures, a GLB writer, and families of shapes built from them."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.sources.shapes import basic, nested, objects, thin, things
from pipeline.sources.shapes.glb import to_glb
from pipeline.sources.shapes.kit import Piece
from pipeline.sources.shapes.textures import Rng

__all__ = ["FAMILIES", "to_glb"]

Family = Callable[[Rng], list[Piece]]

# Kinds alternate, so that a short build is a varied one. The order decides the names of all shapes, hence their uids:
# a change here is another data set.
FAMILIES: dict[str, Family] = {
    family.__name__: family
    for family in (
        *(
            basic.torus_knot,
            objects.chair,
            thin.flag,
            basic.supershape,
            things.mug,
            nested.nested_spheres,
        ),
        *(
            objects.robot,
            basic.vase,
            thin.wireframe,
            objects.car,
            basic.gear,
            things.tree,
            thin.bowl,
            basic.letter,
        ),
        *(
            objects.house,
            nested.inside_out,
            basic.torus,
            objects.table,
            thin.open_box,
            basic.pawn,
            objects.rocket,
        ),
        *(
            basic.gem,
            things.mushroom,
            thin.fence,
            basic.crate,
            objects.lamp,
            nested.shuffled,
            basic.star,
        ),
        *(
            things.castle,
            thin.mobius,
            basic.bottle,
            objects.airplane,
            basic.pebble,
            thin.umbrella,
            things.snowman,
        ),
        *(
            nested.thick_box,
            basic.heart,
            objects.boat,
            thin.ladder,
            basic.barrel,
            things.bookshelf,
            thin.plates,
        ),
        *(basic.ball, nested.doubled, thin.spring, basic.pill, things.dumbbell, thin.paper_plane),
    )
}
