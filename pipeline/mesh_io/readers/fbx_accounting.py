"""Account for everything in an FBX file: report what no part of the reader uses.

An element, an object, a property or a connected texture is either read (`fbx_schema`), or listed in
`pipeline.mesh_io.ignored_elements`, or reported.
"""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase
from functools import lru_cache
from math import isfinite

from pipeline.mesh_io.ignored_elements import IGNORED_ELEMENTS
from pipeline.mesh_io.readers.fbx_document import PROPERTY_LISTS, FbxDocument
from pipeline.mesh_io.readers.fbx_materials import stated_values
from pipeline.mesh_io.readers.fbx_schema import (
    DEFORMERS,
    READ_ELEMENTS,
    READ_PROPERTIES,
    READ_VALUES,
    TEXTURE_ROLES,
    UNDRAWN_LAYERS,
    UNDRAWN_TEXTURES,
    UNDRAWN_VALUES,
    plain_name,
    stated_name,
)
from pipeline.mesh_io.readers.fbx_tree import FbxElement

CHECKED_LAYERS = "LayerElement"
USER_FLAG = "U"  # of properties that users or applications add
TEXTURES = ("Texture", "LayeredTexture")


def account(document: FbxDocument) -> None:
    """Report each element, object, property and texture that is neither read nor listed.

    The warnings are "unknown_element", "unknown_attribute" and "appearance_ignored".
    """
    found: Counter[tuple[str, str]] = Counter()
    _check_children(document.file.root, "", found)
    for top in document.file.root.all("Objects"):
        _check_children(top, "Objects", found)
    _check_properties(document.settings.element, "GlobalSettings", found)
    for item in document.objects.values():
        kind = item.kind
        if kind not in READ_ELEMENTS and kind not in READ_PROPERTIES:
            continue
        if kind == "Deformer" and item.subtype not in DEFORMERS:
            if not _is_ignored(f"Deformer {item.subtype}"):
                found["unknown_element", f"Deformer {item.subtype}"] += 1
            continue
        if kind == "Model" and _is_ignored(f"Model {item.subtype}"):
            continue
        if kind in READ_ELEMENTS:
            _check_children(item.element, kind, found)
            for child in item.element.children:
                if child.name in READ_ELEMENTS:
                    _check_children(child, child.name, found)
        if kind in READ_PROPERTIES:
            _check_properties(item.element, kind, found)
        if kind == "Material":
            for source, name in item.sources:
                plain = plain_name(name)
                if source.kind not in TEXTURES or plain in TEXTURE_ROLES:
                    continue
                if plain in UNDRAWN_TEXTURES:
                    found["appearance_ignored", f"texture {name}"] += 1
                elif not _is_ignored(f"texture {plain}"):
                    found["unknown_attribute", f"texture {name}"] += 1
            for name, stated in item.properties.items():
                if any(isinstance(value, float) and not isfinite(value) for value in stated):
                    found["invalid_value", f"{item.name}: {name} is not finite"] += 1
            for name, value in stated_values(item).items():
                if name in UNDRAWN_VALUES and value and value[0]:
                    found["appearance_ignored", f"{item.name}: {name.strip('|')}"] += 1
        if kind == "Geometry" or item.element.first("Vertices") is not None:
            smoothness = item.element.first("Smoothness")
            if smoothness is not None and smoothness.number() > 0:
                found["appearance_ignored", f"{item.name}: subdivision, the cage is drawn"] += 1
    for (code, detail), count in sorted(found.items()):
        document.warnings.add(code, detail, count)


def _check_children(element: FbxElement, kind: str, found: Counter[tuple[str, str]]) -> None:
    read = READ_ELEMENTS[kind]
    for child in element.children:
        if child.name in read:
            continue
        detail = f"{kind}.{child.name}" if kind else child.name
        if UNDRAWN_LAYERS.fullmatch(child.name):
            found["appearance_ignored", detail] += 1
            continue
        if not (_is_ignored(child.name) or _is_ignored(detail)):
            found["unknown_element", detail[:80]] += 1


def _check_properties(element: FbxElement, kind: str, found: Counter[tuple[str, str]]) -> None:
    read = READ_PROPERTIES[kind]
    shapes = {shape.text() for shape in element.all("Shape")}
    for list_name, first in PROPERTY_LISTS.items():
        for properties in element.all(list_name):
            for row in properties.children:
                name = row.text()
                if not name or name in read or USER_FLAG in row.text(first - 1):
                    continue
                if kind == "Material":
                    if stated_name(name) in READ_VALUES:
                        continue
                    name = plain_name(name)
                if name in shapes:
                    continue  # version 6: the weight of a blend shape
                if not _is_ignored(f"{kind}:{name}"):
                    found["unknown_attribute", f"{kind}: {name}"[:80]] += 1


@lru_cache(maxsize=8192)
def _is_ignored(name: str) -> bool:
    """Return whether `ignored_elements` lists a name. An entry may contain "*"."""
    return any(fnmatchcase(name, pattern) for pattern in IGNORED_ELEMENTS["fbx"])
