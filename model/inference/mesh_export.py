"""Meshes as files others read: GLB, OBJ, PLY or STL by the name's ending."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMATS = (".glb", ".obj", ".ply", ".stl")
CLAY = (0.30, 0.38, 0.48)  # linear base colour: nothing generates a texture


def check_format(path: Path) -> Path:
    """The path itself. ValueError if its ending is not one of FORMATS."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"{path} must end in one of {', '.join(FORMATS)}, got {path.suffix or 'no ending'}"
        )
    return path


def write_mesh(path: Path, vertices: NDArray[np.floating], faces: NDArray[np.integer]) -> None:
    """Write a mesh [V, 3], [F, 3] in the frame it has (y up, unit cube); parent directories are made.

    The same mesh gives the same bytes, and the file appears whole or not at all. ValueError as `check_format`.
    """
    import trimesh  # here: the models do without it
    from trimesh.visual import TextureVisuals
    from trimesh.visual.material import PBRMaterial

    check_format(path)
    mesh: Any = trimesh.Trimesh(vertices, faces, process=False, validate=False)
    kind = path.suffix.lower()[1:]
    if kind == "glb":
        color = [*(round(255 * c) for c in CLAY), 255]
        mesh.visual = TextureVisuals(
            material=PBRMaterial(baseColorFactor=color, metallicFactor=0.0, roughnessFactor=0.8)
        )
    data = mesh.export(
        file_type=kind, **({"include_normals": True} if kind in ("glb", "obj") else {})
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
