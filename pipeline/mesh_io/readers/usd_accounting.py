"""Account for the prims, properties and applied schemas of a USD stage.

Each is read (the tables below), or listed in `pipeline.mesh_io.ignored_elements`, or reported.
"""

# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase
from functools import lru_cache

from pxr import Sdf, Usd

from pipeline.mesh_io.ignored_elements import IGNORED_ELEMENTS
from pipeline.mesh_io.load_warnings import WarningLog

# Types of prims that only hold others.
CONTAINERS = ("", "Xform", "Scope", "SkelRoot")
READ_PRIMS = (*CONTAINERS, "GeomSubset", "Material", "Shader", "NodeGraph", "PointInstancer")

_IMAGEABLE = ("visibility", "purpose", "renderVisibility", "material:binding*")
_PLACED = (*_IMAGEABLE, "xformOp:*", "xformOpOrder")
_DRAWN = (*_PLACED, "orientation", "normals")
_SHADER = ("info:id", "info:implementationSource", "outputs:*")
# Type of prim or shader -> patterns of the properties that are read.
READ_PROPERTIES: dict[str, tuple[str, ...]] = {
    "": _PLACED,
    "Xform": _PLACED,
    "Scope": _IMAGEABLE,
    "SkelRoot": _PLACED,
    "Mesh": (
        *(*_DRAWN, "points", "faceVertexCounts", "faceVertexIndices", "holeIndices"),
        "subdivisionScheme",
    ),
    "TetMesh": (*_DRAWN, "points", "surfaceFaceVertexIndices", "tetVertexIndices"),
    "Cube": (*_DRAWN, "size"),
    "Sphere": (*_DRAWN, "radius"),
    "Cylinder": (*_DRAWN, "radius", "height", "axis"),
    "Cylinder_1": (*_DRAWN, "radiusBottom", "radiusTop", "height", "axis"),
    "Cone": (*_DRAWN, "radius", "height", "axis"),
    "Capsule": (*_DRAWN, "radius", "height", "axis"),
    "Capsule_1": (*_DRAWN, "radiusBottom", "radiusTop", "height", "axis"),
    "Plane": (*_DRAWN, "width", "length", "axis"),
    "PointInstancer": (
        *(*_PLACED, "prototypes", "protoIndices", "positions", "orientations", "orientationsf"),
        *("scales", "ids", "invisibleIds"),
    ),
    "GeomSubset": ("elementType", "familyName", "indices", "material:binding*"),
    "Material": ("inputs:*", "outputs:*"),
    "UsdPreviewSurface": (
        *_SHADER,
        *(
            f"inputs:{name}"
            for name in (
                *("diffuseColor", "emissiveColor", "useSpecularWorkflow", "specularColor"),
                *("metallic", "roughness", "clearcoat", "opacity", "opacityThreshold", "ior"),
                *("normal", "displacement", "occlusion"),
            )
        ),
    ),
    "UsdUVTexture": (
        *_SHADER,
        *(
            f"inputs:{name}"
            for name in (
                *("file", "st", "wrapS", "wrapT", "fallback", "scale", "bias"),
                "sourceColorSpace",
            )
        ),
    ),
    "UsdPrimvarReader": (*_SHADER, "inputs:varname", "inputs:fallback"),
    "UsdTransform2d": (
        *_SHADER,
        *(f"inputs:{name}" for name in ("in", "rotation", "scale", "translation")),
    ),
}
READ_SCHEMAS = ("MaterialBindingAPI", "VisibilityAPI", "GeomModelAPI")


class Accounting:
    """Collects what no part of the reader uses.

    Args:
        warnings: Receives the warnings.
    """

    def __init__(self, warnings: WarningLog):
        self.warnings = warnings
        self._visited: set[Sdf.Path] = set()
        self._found: Counter[tuple[str, str]] = Counter()

    def check(self, prim: Usd.Prim, kind: str | None = None) -> None:
        """Check the properties and the applied schemas of a prim, each prim once.

        Args:
            prim: The prim.
            kind: Key of `READ_PROPERTIES`. None is the type of the prim.
        """
        if prim.IsInstanceProxy():
            prim = prim.GetPrimInPrototype()
        if prim.GetPath() in self._visited:
            return
        self._visited.add(prim.GetPath())
        kind = str(prim.GetTypeName()) if kind is None else kind
        patterns = READ_PROPERTIES.get(kind, ())
        for name in prim.GetAuthoredPropertyNames():
            if not (_matches(name, patterns) or is_ignored(name) or is_ignored(f"{kind}.{name}")):
                attribute = prim.GetProperty(name)
                if not attribute.IsCustom():
                    self._found["unknown_attribute", f"{kind or 'def'}.{name}"] += 1
        for name in prim.GetPrimTypeInfo().GetAppliedAPISchemas():
            schema = name.partition(":")[0]
            if schema not in READ_SCHEMAS and not is_ignored(schema):
                self._found["unknown_extension", schema] += 1

    def unknown_prim(self, prim: Usd.Prim) -> None:
        """Record a prim of a type that the reader does not know."""
        self._found["unknown_element", str(prim.GetTypeName())] += 1

    def report(self) -> None:
        """Add the warnings."""
        for (code, detail), count in sorted(self._found.items()):
            self.warnings.add(code, detail, count)


@lru_cache(maxsize=4096)
def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@lru_cache(maxsize=4096)
def is_ignored(name: str) -> bool:
    """Return whether `ignored_elements` lists a name. An entry may contain "*"."""
    return any(fnmatchcase(name, pattern) for pattern in IGNORED_ELEMENTS["usd"])
