"""The objects of an FBX file with their properties and connections, for versions 6 and 7.

Version 6 names objects where version 7 numbers them, and keeps meshes in their nodes. Here both
look like version 7.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.readers.fbx_tree import SEPARATOR, FbxElement, FbxFile

Key = int | str  # version 7: the number of an object, version 6: its class and name
ROOT_NAMES = ("Model::Scene", "Scene")
PROPERTY_LISTS = {"Properties70": 4, "Properties60": 3}  # name: where the values of a row begin


@dataclass(kw_only=True, eq=False)
class FbxObject:
    """An object of the file.

    Attributes:
        key: What connections name it by.
        kind: "Model", "Geometry", "Material" and so on: the name of its element.
        name: Its name, for warnings.
        subtype: "Mesh", "Shape", "Skin" and so on.
        element: Its element.
        properties: {name: values} that the object states, or else the template of its kind.
        own_properties: Names of the properties that the object itself states.
        sources: (object, property or "") connected to it, in the order of the file.
        targets: (object, property or "") that it is connected to.
    """

    key: Key
    kind: str
    name: str
    subtype: str
    element: FbxElement
    properties: dict[str, list[object]] = field(default_factory=dict)
    own_properties: frozenset[str] = frozenset()
    sources: list[tuple[FbxObject, str]] = field(default_factory=list)
    targets: list[tuple[FbxObject, str]] = field(default_factory=list)

    def all_sources(self, kind: str, *subtypes: str) -> Iterator[FbxObject]:
        """Yield the connected objects of a kind, and of one of the subtypes if any are given."""
        return (
            source
            for source, _ in self.sources
            if source.kind == kind and (not subtypes or source.subtype in subtypes)
        )

    def number(self, name: str, default: float) -> float:
        """Return a property as a number."""
        values = self.properties.get(name, [])
        value = values[0] if values else default
        return float(value) if isinstance(value, int | float) else default

    def vector(
        self, name: str, default: tuple[float, ...] = (0.0, 0.0, 0.0)
    ) -> NDArray[np.float64]:
        """Return a property as a vector [3] of finite numbers."""
        values = [v for v in self.properties.get(name, [])[:3] if isinstance(v, int | float)]
        vector = np.array(values if len(values) == 3 else default, dtype=np.float64)
        return vector if np.isfinite(vector).all() else np.array(default, dtype=np.float64)

    def text(self, name: str) -> str:
        """Return a property as text."""
        values = self.properties.get(name, [])
        return values[0] if values and isinstance(values[0], str) else ""


@dataclass(kw_only=True)
class FbxDocument:
    """The objects of a file.

    Attributes:
        file: The parsed file.
        objects: All objects by key, in the order of the file.
        root: The root of the scene, to which top-level nodes are connected.
        settings: The global settings, as an object with properties.
        warnings: Receives what cannot be used.
    """

    file: FbxFile
    objects: dict[Key, FbxObject]
    root: FbxObject
    settings: FbxObject
    warnings: WarningLog

    def of_kind(self, kind: str) -> Iterator[FbxObject]:
        """Yield the objects of a kind."""
        return (item for item in self.objects.values() if item.kind == kind)

    def numbers(
        self, element: FbxElement | None, dtype: type[np.generic] = np.float64
    ) -> NDArray[Any]:
        """Return the numbers of an element, see `ArrayDecoder.numbers`."""
        return self.file.arrays.numbers(element, dtype)


def read_document(file: FbxFile, warnings: WarningLog) -> FbxDocument:
    """Collect the objects of a file and connect them.

    Args:
        file: The parsed file.
        warnings: Receives "invalid_value" for objects and connections that are not possible.
    """
    root_key: Key = 0 if file.version >= 7000 else ROOT_NAMES[0]
    root = FbxObject(
        key=root_key, kind="Model", name="scene", subtype="", element=FbxElement(name="")
    )
    templates = _templates(file.root)
    settings = FbxObject(
        key="settings", kind="GlobalSettings", name="", subtype="", element=FbxElement(name="")
    )
    objects: dict[Key, FbxObject] = {}
    for top in file.root.children:
        if top.name == "GlobalSettings":
            settings.element = top
            settings.properties = read_properties(top)
    for top in file.root.all("Objects"):
        for element in top.children:
            if element.name == "GlobalSettings":
                settings.element = element
                settings.properties = read_properties(element)
                continue
            item = _read_object(element, file.version, templates)
            if item.key in objects:
                # Connections lead to the first one. The other one is drawn if it stands alone.
                warnings.add("invalid_value", f"two objects are {str(item.key)[:80]}")
                item.key = f"{item.key} {len(objects)}"
            objects[item.key] = item
    document = FbxDocument(
        file=file, objects=objects, root=root, settings=settings, warnings=warnings
    )
    _connect(document)
    return document


def read_properties(element: FbxElement) -> dict[str, list[object]]:
    """Return {name: values} of the property list of an element."""
    return {
        row.text(): row.values[first:]
        for name, first in PROPERTY_LISTS.items()
        for properties in element.all(name)
        for row in properties.children
        if row.text()
    }


def _templates(root: FbxElement) -> dict[str, dict[str, list[object]]]:
    """Return the default properties of each kind of object."""
    templates: dict[str, dict[str, list[object]]] = {}
    for definitions in root.all("Definitions"):
        for kind in definitions.all("ObjectType"):
            for template in kind.all("PropertyTemplate"):
                templates.setdefault(kind.text(), {}).update(read_properties(template))
    return templates


def _read_object(
    element: FbxElement, version: int, templates: dict[str, dict[str, list[object]]]
) -> FbxObject:
    first = element.values[0] if element.values else None
    texts = [value for value in element.values if isinstance(value, str)]
    label = texts[0] if texts else ""
    if SEPARATOR in label:
        name, _, kind = label.partition(SEPARATOR)
        label = f"{kind}::{name}"
    else:
        name = label.rpartition("::")[2]
    own = read_properties(element)
    return FbxObject(
        key=first if isinstance(first, int) and version >= 7000 else label,
        kind=element.name,
        name=name,
        subtype=texts[1] if len(texts) > 1 else "",
        element=element,
        properties={**templates.get(element.name, {}), **own},
        own_properties=frozenset(own),
    )


def _connect(document: FbxDocument) -> None:
    """Fill the sources and targets of all objects.

    Connections to properties of the target ("OP") carry the name of the property. Those of and to
    objects that do not exist are left out with a warning, except for built-in objects.
    """
    missing = 0
    example = ""
    for top in document.file.root.all("Connections"):
        for row in top.all("C", "Connect"):
            kind = row.text(0)
            if kind not in ("OO", "OP") or len(row.values) < 3:
                continue  # connections of properties drive animations and constraints
            source = _find(document, row.values[1])
            target = _find(document, row.values[2])
            if source is None or target is None:
                missing += 1
                example = f"connection {row.values[1]} to {row.values[2]}".replace("\0\1", "::")
                continue
            name = row.text(3) if kind == "OP" else ""
            target.sources.append((source, name))
            source.targets.append((target, name))
    document.warnings.add("invalid_value", f"{example}: no such object", missing)


def _find(document: FbxDocument, key: object) -> FbxObject | None:
    if isinstance(key, str):
        if SEPARATOR in key:
            name, _, kind = key.partition(SEPARATOR)
            key = f"{kind}::{name}"
        if key in ROOT_NAMES:
            return document.objects.get(key, document.root)
    elif not isinstance(key, int):
        return None
    if key == document.root.key:
        return document.root
    return document.objects.get(key)
