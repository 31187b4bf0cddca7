"""Account for everything in a glTF document: report what no part of the reader uses.

A property of an object, an attribute of a primitive or an extension is either read (the tables
below), or listed in `pipeline.mesh_io.ignored_elements`, or reported.
"""

from __future__ import annotations

import re
from collections import Counter
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from pipeline.mesh_io.ignored_elements import IGNORED_ELEMENTS
from pipeline.mesh_io.readers.gltf_document import Document
from pipeline.mesh_io.readers.gltf_materials import UNDRAWN_MATERIALS

# Kind of object -> property that is read -> kind of the object or of the objects in the list there.
# "" is a value without properties.
_TEXTURE = {"index": "", "texCoord": ""}
READ_PROPERTIES: dict[str, dict[str, str]] = {
    "document": {
        "asset": "asset",
        "scene": "",
        "scenes": "scene",
        "nodes": "node",
        "meshes": "mesh",
        "skins": "skin",
        "materials": "material",
        "textures": "texture",
        "samplers": "sampler",
        "images": "image",
        "accessors": "accessor",
        "bufferViews": "view",
        "buffers": "buffer",
        "extensionsUsed": "",
        "extensionsRequired": "",
    },
    "asset": {"version": "", "minVersion": ""},
    "scene": {"nodes": ""},
    "node": dict.fromkeys(
        (
            "children",
            "matrix",
            "translation",
            "rotation",
            "scale",
            "mesh",
            "skin",
            "weights",
        ),
        "",
    ),
    "mesh": {"primitives": "primitive", "weights": ""},
    "primitive": {
        "attributes": "attributes",
        "indices": "",
        "material": "",
        "mode": "",
        "targets": "target",
    },
    "skin": {"joints": "", "inverseBindMatrices": ""},
    "material": {
        "pbrMetallicRoughness": "metallic roughness",
        "normalTexture": "normal texture",
        "occlusionTexture": "occlusion texture",
        "emissiveTexture": "texture info",
        "emissiveFactor": "",
        "alphaMode": "",
        "alphaCutoff": "",
        "doubleSided": "",
    },
    "metallic roughness": {
        "baseColorFactor": "",
        "baseColorTexture": "texture info",
        "metallicFactor": "",
        "roughnessFactor": "",
        "metallicRoughnessTexture": "texture info",
    },
    "texture info": _TEXTURE,
    "normal texture": _TEXTURE | {"scale": ""},
    "occlusion texture": _TEXTURE | {"strength": ""},
    "texture": {"source": "", "sampler": ""},
    "sampler": {"wrapS": "", "wrapT": "", "magFilter": ""},
    "image": {"uri": "", "bufferView": ""},
    "accessor": {
        "bufferView": "",
        "byteOffset": "",
        "componentType": "",
        "count": "",
        "type": "",
        "normalized": "",
        "sparse": "sparse",
    },
    "sparse": {"count": "", "indices": "sparse array", "values": "sparse array"},
    "sparse array": {"bufferView": "", "byteOffset": "", "componentType": ""},
    "view": {"buffer": "", "byteOffset": "", "byteLength": "", "byteStride": ""},
    "buffer": {"uri": "", "byteLength": ""},
    # Extensions
    "instancing": {"attributes": "instancing attributes"},
    "draco": {"bufferView": "", "attributes": "draco attributes"},
    "meshopt": dict.fromkeys(
        ("buffer", "byteOffset", "byteLength", "byteStride", "count", "mode", "filter"), ""
    ),
    "meshopt fallback": {"fallback": ""},
    "texture transform": {"offset": "", "rotation": "", "scale": "", "texCoord": ""},
    "specular glossiness": {
        "diffuseFactor": "",
        "diffuseTexture": "texture info",
        "specularFactor": "",
        "glossinessFactor": "",
        "specularGlossinessTexture": "texture info",
    },
    "emissive strength": {"emissiveStrength": ""},
    "image source": {"source": ""},
    "visibility": {"visible": ""},
    "levels of detail": {"ids": ""},
    "empty": {},
}

# (Kind of object, extension that is known there) -> kind of the extension's object. "undrawn" is an
# extension of the look that gives the warning "appearance_ignored": for a material where it has an
# effect on a drawn one, for the document at once.
_TEXTURE_INFOS = ("texture info", "normal texture", "occlusion texture")
READ_EXTENSIONS: dict[tuple[str, str], str] = {
    ("node", "EXT_mesh_gpu_instancing"): "instancing",
    ("node", "KHR_node_visibility"): "visibility",
    ("node", "MSFT_lod"): "levels of detail",
    ("material", "MSFT_lod"): "levels of detail",
    ("primitive", "KHR_draco_mesh_compression"): "draco",
    ("view", "EXT_meshopt_compression"): "meshopt",
    ("view", "KHR_meshopt_compression"): "meshopt",
    ("buffer", "EXT_meshopt_compression"): "meshopt fallback",
    ("buffer", "KHR_meshopt_compression"): "meshopt fallback",
    ("material", "KHR_materials_emissive_strength"): "emissive strength",
    ("material", "KHR_materials_unlit"): "empty",
    ("material", "KHR_materials_pbrSpecularGlossiness"): "specular glossiness",
    ("texture", "EXT_texture_webp"): "image source",
    ("texture", "EXT_texture_avif"): "image source",
    ("texture", "KHR_texture_basisu"): "image source",
    ("texture", "MSFT_texture_dds"): "image source",
    **{(kind, "KHR_texture_transform"): "texture transform" for kind in _TEXTURE_INFOS},
    **{("material", name): "undrawn" for name in UNDRAWN_MATERIALS},
    ("document", "KHR_techniques_webgl"): "undrawn",
    ("document", "VRM"): "undrawn",  # the looks of characters, with shaders of their own
}
# Extensions without an object of their own: what they allow is read.
READ_EVERYWHERE = ("KHR_mesh_quantization", "KHR_accessor_float64")

# Attributes that are read, by the kind of object that lists them.
READ_ATTRIBUTES = {
    "attributes": r"POSITION|NORMAL|TEXCOORD_\d+|COLOR_0|JOINTS_\d+|WEIGHTS_\d+",
    "target": r"POSITION|NORMAL|TEXCOORD_\d+|COLOR_0",
    "draco attributes": r"POSITION|NORMAL|TEXCOORD_\d+|COLOR_0|JOINTS_\d+|WEIGHTS_\d+",
    "instancing attributes": r"TRANSLATION|ROTATION|SCALE",
}


def account(document: Document) -> None:
    """Report every property, attribute and extension of a document that is neither read nor listed.

    The warnings are "unknown_element", "unknown_attribute", "unknown_extension" and, for known
    extensions of the look that are not drawn, "appearance_ignored".
    """
    found: Counter[tuple[str, str]] = Counter()
    # The kinds bound the depth: no object is visited twice.
    pending: list[tuple[str, Any]] = [("document", document.root.data)]
    while pending:
        kind, data = pending.pop()
        if isinstance(data, list):
            pending += [(kind, item) for item in data]
            continue
        if not isinstance(data, dict):
            continue  # the part of the reader that uses the value reports it
        if kind in READ_ATTRIBUTES:
            for name in data:
                is_read = re.fullmatch(READ_ATTRIBUTES[kind], name) is not None
                if not is_read and not _is_ignored(f"attribute {name}"):
                    found["unknown_attribute", f"{kind}: {name}"] += 1
            continue
        properties = READ_PROPERTIES[kind]
        for key, value in data.items():
            if key == "extensions":
                pending += _extensions(kind, value, found)
            elif key in properties:
                if properties[key]:
                    pending.append((properties[key], value))
            elif not (_is_ignored(key) or _is_ignored(f"{kind}.{key}")):
                found["unknown_element", f"{kind}.{key}"] += 1
    # Extensions that only the lists of the document name.
    known = {name for _, name in READ_EXTENSIONS} | set(READ_EVERYWHERE)
    reported = {detail.partition(".")[2] for code, detail in found if code == "unknown_extension"}
    for key in ("extensionsRequired", "extensionsUsed"):
        for name in document.root.values(key):
            if not isinstance(name, str) or name in known or _is_ignored(name):
                continue
            if name not in reported:
                reported.add(name)
                found["unknown_extension", f"{key}: {name}"] += 1
    for (code, detail), count in sorted(found.items()):
        document.warnings.add(code, detail, count)


def _extensions(kind: str, extensions: Any, found: Counter[tuple[str, str]]) -> list[Any]:
    """Report the unknown extensions of an object and return (kind, data) of the read ones."""
    if not isinstance(extensions, dict):
        found["unknown_element", f"{kind}.extensions"] += 1
        return []
    read = []
    for name, value in extensions.items():
        extension_kind = READ_EXTENSIONS.get((kind, name))
        if extension_kind is not None:
            if extension_kind != "undrawn":
                read.append((extension_kind, value))
            elif kind == "document":
                found["appearance_ignored", f"{kind}.{name}"] += 1
        elif name not in READ_EVERYWHERE and not _is_ignored(name):
            found["unknown_extension", f"{kind}.{name}"] += 1
    return read


@lru_cache(maxsize=4096)
def _is_ignored(name: str) -> bool:
    """Return whether `ignored_elements` lists a name. An entry may end with "*"."""
    return any(fnmatchcase(name, pattern) for pattern in IGNORED_ELEMENTS["gltf"])
