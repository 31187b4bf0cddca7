"""Write FBX files, binary and text, from a tree of (name, values, children)."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

Element = tuple[str, Sequence[Any], Sequence[Any]]
HEADER = b"Kaydara FBX Binary  \x00\x1a\x00"
CODES = {"float32": "f", "float64": "d", "int64": "l", "int32": "i", "bool": "b"}

CUBE = np.array([[x, y, z] for z in (-1, 1) for y in (-1, 1) for x in (-1, 1)], dtype=np.float64)
# The six quads of CUBE, seen from outside in counter-clockwise order.
QUADS = [[0, 2, 3, 1], [4, 5, 7, 6], [0, 1, 5, 4], [2, 6, 7, 3], [0, 4, 6, 2], [1, 3, 7, 5]]


def e(name: str, *values: Any, children: Sequence[Element] = ()) -> Element:
    """Return an element."""
    return name, values, children


def binary(
    tree: Sequence[Element], version: int = 7400, *, order: str = "<", compress: bool = True
) -> bytes:
    """Return a binary file with the elements at the top level."""
    content = HEADER if order == "<" else HEADER[:-1] + b"\x01"
    content += struct.pack(f"{order}I", version)
    for element in tree:
        content += _record(element, len(content), version, order, compress)
    return content + bytes(25 if version >= 7500 else 13) + bytes(160)


def _record(element: Element, start: int, version: int, order: str, compress: bool) -> bytes:
    name, values, children = element
    head = struct.Struct(order + ("QQQB" if version >= 7500 else "IIIB"))
    body = b"".join(_value(value, order, compress) for value in values)
    first = start + head.size + len(name)
    content = body
    for child in children:
        content += _record(child, first + len(content), version, order, compress)
    if children:
        content += bytes(head.size)
    label = name.encode()
    counts = (first + len(content), len(values), len(body), len(label))
    return head.pack(*counts) + label + content


def _value(value: Any, order: str, compress: bool) -> bytes:
    if isinstance(value, np.ndarray):
        data = value.astype(value.dtype.newbyteorder(order)).tobytes()
        packed = zlib.compress(data) if compress else data
        sizes = struct.pack(f"{order}III", value.size, int(compress), len(packed))
        return CODES[value.dtype.name].encode() + sizes + packed
    if isinstance(value, bool):
        return b"C" + bytes([value])
    if isinstance(value, int):
        kind = "i" if abs(value) < 2**31 else "q"
        return (b"I" if kind == "i" else b"L") + struct.pack(order + kind, value)
    if isinstance(value, float):
        return b"D" + struct.pack(f"{order}d", value)
    if isinstance(value, bytes):
        return b"R" + struct.pack(f"{order}I", len(value)) + value
    name = value.encode()
    if "::" in value:  # "Model::Cube" of text files
        kind, _, label = value.partition("::")
        name = f"{label}\0\x01{kind}".encode()
    return b"S" + struct.pack(f"{order}I", len(name)) + name


def text(tree: Sequence[Element], version: int = 7400) -> bytes:
    """Return a text file with the elements at the top level."""
    major, minor = divmod(version // 100, 10)
    head = f"; FBX {major}.{minor}.0 project file\n; a comment: with {{ braces }}\n"
    return (head + "".join(_text(element, 0, version) for element in tree)).encode()


def _text(element: Element, depth: int, version: int) -> str:
    name, values, children = element
    indent = "\t" * depth
    words = []
    for value in values:
        if isinstance(value, np.ndarray):
            numbers = ",".join(map(repr, value.ravel().tolist()))
            if version >= 7000:
                return f"{indent}{name}: *{value.size} {{\n{indent}\ta: {numbers}\n{indent}}} \n"
            words.append(numbers.replace(",", ",\n" + indent, 3))
        elif isinstance(value, bool):
            words.append("T" if value else "F")
        elif isinstance(value, bytes):
            middle = len(value) // 2 // 3 * 3
            pieces = (value[:middle], value[middle:])
            words += [f'"{base64.b64encode(piece).decode()}"' for piece in pieces]
        elif isinstance(value, str):
            words.append('"' + value.replace('"', "&quot;") + '"')
        else:
            words.append(repr(value))
    line = f"{indent}{name}: {', '.join(words)}"
    if not children:
        return line + "\n"
    inner = "".join(_text(child, depth + 1, version) for child in children)
    return f"{line} {{\n{inner}{indent}}}\n"


def p(name: str, *values: Any, kind: str = "", flags: str = "") -> Element:
    """Return a property."""
    return e("P", name, kind, "", flags, *values)


def properties(*rows: Element) -> Element:
    """Return the properties of an object."""
    return e("Properties70", children=rows)


def layer(
    name: str, mapping: str, reference: str, *arrays: tuple[str, Any], number: int = 0, label=""
) -> Element:
    """Return a layer of a mesh. Arrays are (name, values)."""
    return e(
        name,
        number,
        children=[
            e("Version", 101),
            e("Name", label),
            e("MappingInformationType", mapping),
            e("ReferenceInformationType", reference),
            *(e(key, np.asarray(values)) for key, values in arrays),
        ],
    )


def polygon_indices(polygons: Sequence[Sequence[int]]) -> np.ndarray:
    """Return the corners of polygons, the last one of each as -1 - index."""
    return np.array([k for p in polygons for k in (*p[:-1], ~p[-1])], dtype=np.int32)


def mesh(key: int, *layers: Element, vertices=CUBE, polygons=QUADS, name: str = "mesh") -> Element:
    """Return a geometry, by default the cube from -1 to 1."""
    return e(
        "Geometry",
        key,
        f"Geometry::{name}",
        "Mesh",
        children=[
            e("Vertices", np.asarray(vertices, dtype=np.float64).ravel()),
            e("PolygonVertexIndex", polygon_indices(polygons)),
            *layers,
        ],
    )


def model(key: int, *rows: Element, name: str = "node", kind: str = "Mesh", children=()) -> Element:
    """Return a node."""
    return e("Model", key, f"Model::{name}", kind, children=[properties(*rows), *children])


def material(key: int, *rows: Element, name: str = "material") -> Element:
    """Return a material."""
    shading = e("ShadingModel", "phong")
    return e("Material", key, f"Material::{name}", "", children=[shading, properties(*rows)])


def settings(*rows: Element) -> Element:
    """Return the global settings."""
    return e("GlobalSettings", children=[properties(*rows)])


def axes(coord: int, up: int, front: int, signs=(1, 1, 1)) -> Element:
    """Return global settings with axes."""
    return settings(
        p("CoordAxis", coord),
        p("CoordAxisSign", signs[0]),
        p("UpAxis", up),
        p("UpAxisSign", signs[1]),
        p("FrontAxis", front),
        p("FrontAxisSign", signs[2]),
        p("UnitScaleFactor", 1.0),
    )


def document(
    objects: Sequence[Element],
    connections: Sequence[tuple[Any, ...]],
    *others: Element,
    links: str = "C",
) -> list[Element]:
    """Return the top level of a file.

    Connections are (source, target) or (source, target, property).
    """
    return [
        e("FBXHeaderExtension", children=[e("FBXHeaderVersion", 1003)]),
        *others,
        e("Objects", children=objects),
        e(
            "Connections",
            children=[e(links, "OP" if len(link) > 2 else "OO", *link) for link in connections],
        ),
    ]


def cube(*rows: Element, others: Sequence[Element] = (), links=(), top=(), layers=()) -> list:
    """Return a file with the cube at one node.

    Args:
        *rows: Properties of the node, whose key is 2. The key of the mesh is 1.
        others: Further objects.
        links: Further connections.
        top: Further elements at the top level.
        layers: Layers of the mesh.
    """
    objects = [mesh(1, *layers), model(2, *rows), *others]
    return document(objects, [(1, 2), (2, 0), *links], *top)
