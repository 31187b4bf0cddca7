"""What the mesh readers leave out without a warning, with the reason.

Everything else in a file is used or gives a warning. An entry may be here only if it cannot alter
geometry, colour, alpha or frame of the first pose.
"""

from __future__ import annotations

# Format -> {element, attribute or extension: reason}.
IGNORED_ELEMENTS: dict[str, dict[str, str]] = {
    "gltf": {},
    "obj": {},
    "mtl": {},
    "ply": {},
    "stl": {},
    "off": {
        "texture coordinates of ST": "The format has no textures.",
        "number of edges": "It follows from the faces.",
    },
    "3mf": {},
    "dae": {},
}
