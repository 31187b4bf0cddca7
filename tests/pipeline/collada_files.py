"""Writers of small COLLADA documents for tests."""

from __future__ import annotations

import numpy as np

NAMESPACE = "http://www.collada.org/2005/11/COLLADASchema"
IDENTITY = "1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1"


def numbers(values) -> str:
    return " ".join(f"{value:g}" for value in np.asarray(values, dtype=float).ravel())


def source(identifier: str, values, names: str = "X Y Z", *, kind: str = "float") -> str:
    """Return a <source> of rows of numbers, or of words."""
    columns = names.split()
    if kind == "float":
        rows = np.asarray(values, dtype=float).reshape(-1, len(columns))
        text, tag, count, rows = numbers(rows), "float_array", rows.size, len(rows)
    else:
        text, tag, count, rows = " ".join(values), kind, len(values), len(values)
    params = "".join(f'<param name="{name}" type="float"/>' for name in columns)
    return (
        f'<source id="{identifier}"><{tag} id="{identifier}-a" count="{count}">{text}</{tag}>'
        f'<technique_common><accessor source="#{identifier}-a" count="{rows}" '
        f'stride="{len(columns)}">{params}</accessor></technique_common></source>'
    )


def matrices(identifier: str, values) -> str:
    rows = np.asarray(values, dtype=float).reshape(-1, 16)
    return (
        f'<source id="{identifier}"><float_array id="{identifier}-a" count="{rows.size}">'
        f'{numbers(rows)}</float_array><technique_common><accessor source="#{identifier}-a" '
        f'count="{len(rows)}" stride="16"><param name="TRANSFORM" type="float4x4"/></accessor>'
        "</technique_common></source>"
    )


def geometry(
    identifier: str, points, primitives: str, *, sources: str = "", vertices: str = "", extra=""
) -> str:
    """Return a <geometry>. `#{identifier}-v` are the vertices."""
    return (
        f'<geometry id="{identifier}"><mesh>{source(f"{identifier}-p", points)}{sources}'
        f'<vertices id="{identifier}-v"><input semantic="POSITION" source="#{identifier}-p"/>'
        f"{vertices}</vertices>{primitives}</mesh>{extra}</geometry>"
    )


def primitive(
    kind: str, identifier: str, content: str, *, count=None, material="", inputs: str = ""
) -> str:
    attributes = "" if count is None else f' count="{count}"'
    attributes += f' material="{material}"' if material else ""
    vertex = f'<input semantic="VERTEX" source="#{identifier}-v" offset="0"/>'
    return f"<{kind}{attributes}>{vertex}{inputs}{content}</{kind}>"


def box(identifier: str = "g", size=(1, 1, 1), *, material: str = "") -> str:
    """Return the <geometry> of a box at the origin."""
    x, y, z = size
    points = [(a, b, c) for c in (0, z) for a, b in ((0, 0), (x, 0), (x, y), (0, y))]
    sides = "0 3 2 1 4 5 6 7 0 1 5 4 1 2 6 5 2 3 7 6 3 0 4 7"
    faces = f"<vcount>{'4 ' * 6}</vcount><p>{sides}</p>"
    return geometry(
        identifier, points, primitive("polylist", identifier, faces, count=6, material=material)
    )


def document(
    geometries: str,
    nodes: str = '<node id="n"><instance_geometry url="#g"/></node>',
    *,
    libraries: str = "",
    asset: str = "<up_axis>Y_UP</up_axis>",
    version: str = "1.4.1",
) -> bytes:
    """Return a document whose scene has these nodes."""
    return (
        f'<?xml version="1.0" encoding="utf-8"?><COLLADA xmlns="{NAMESPACE}" version="{version}">'
        f"<asset><created>2020</created>{asset}</asset>{libraries}"
        f"<library_geometries>{geometries}</library_geometries>"
        f'<library_visual_scenes><visual_scene id="s">{nodes}</visual_scene>'
        '</library_visual_scenes><scene><instance_visual_scene url="#s"/></scene></COLLADA>'
    ).encode()


def material(shader: str, *, identifier="m", parameters="", extra="", instance="") -> str:
    """Return the libraries of one material with an effect."""
    return (
        f'<library_materials><material id="{identifier}"><instance_effect url="#{identifier}-e">'
        f"{instance}</instance_effect></material></library_materials>"
        f'<library_effects><effect id="{identifier}-e"><profile_COMMON>{parameters}'
        f'<technique sid="common">{shader}</technique>{extra}</profile_COMMON></effect>'
        "</library_effects>"
    )


def bound(symbol: str = "a", target: str = "#m", *, url: str = "#g", inputs: str = "") -> str:
    """Return a node that draws a geometry with a bound material."""
    return (
        f'<node><instance_geometry url="{url}"><bind_material><technique_common>'
        f'<instance_material symbol="{symbol}" target="{target}">{inputs}</instance_material>'
        "</technique_common></bind_material></instance_geometry></node>"
    )


def textured_quad(image: str, *, technique: str = "lambert", diffuse: str = "") -> bytes:
    """Return a document with one textured square."""
    diffuse = diffuse or '<texture texture="i" texcoord="UV"/>'
    shader = f"<{technique}><diffuse>{diffuse}</diffuse></{technique}>"
    images = (
        f'<library_images><image id="i"><init_from>{image}</init_from></image></library_images>'
    )
    return document(uv_quad(), bound(inputs=bind_uv("UV", 0)), libraries=images + material(shader))


def bind_uv(semantic: str, number: int) -> str:
    return (
        f'<bind_vertex_input semantic="{semantic}" input_semantic="TEXCOORD" input_set="{number}"/>'
    )


def uv_quad(sets=(0,)) -> str:
    """Return the <geometry> of a square whose set k of coordinates is (x + k, y)."""
    square = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
    sources = "".join(source(f"uv{k}", square[:, :2] + [k, 0], "S T") for k in sets)
    inputs = "".join(
        f'<input semantic="TEXCOORD" source="#uv{k}" offset="1" set="{k}"/>' for k in sets
    )
    faces = "<vcount>4</vcount><p>0 0 1 1 2 2 3 3</p>"
    return geometry(
        "g",
        square,
        primitive("polylist", "g", faces, count=1, material="a", inputs=inputs),
        sources=sources,
    )
