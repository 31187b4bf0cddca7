"""Mesh files: GLB, OBJ, PLY or STL, chosen by the ending of the name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.files import write_atomically

FORMATS = (".glb", ".obj", ".ply", ".stl")
BASE_COLOR = (0.30, 0.38, 0.48)  # linear RGB of all meshes, since no texture is generated


def check_format(path: Path) -> Path:
    """Return the path unchanged if its ending is a mesh format.

    Raises:
        ValueError: If it ends in none of FORMATS.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"{path} must end in one of {', '.join(FORMATS)}, got {path.suffix or 'no ending'}"
        )
    return path


def write_mesh(path: Path, vertices: NDArray[np.floating], faces: NDArray[np.integer]) -> None:
    """Write a mesh to a file, which replaces an older one when it is complete.

    The same mesh gives the same bytes.

    Args:
        path: The file. Its parent directories are created.
        vertices: [V, 3], y up. They are written as they are.
        faces: [F, 3], counterclockwise seen from outside.

    Raises:
        ValueError: If `path` ends in none of FORMATS.
    """
    # Most commands write no mesh, so trimesh is imported here.
    import trimesh
    from trimesh.visual import TextureVisuals
    from trimesh.visual.material import PBRMaterial

    kind = check_format(path).suffix.lower()[1:]
    mesh: Any = trimesh.Trimesh(vertices, faces, process=False, validate=False)
    if kind == "glb":
        color = [*(round(255 * channel) for channel in BASE_COLOR), 255]
        material = PBRMaterial(baseColorFactor=color, metallicFactor=0.0, roughnessFactor=0.8)
        mesh.visual = TextureVisuals(material=material)
    options = {"include_normals": True} if kind in ("glb", "obj") else {}
    write_atomically(path, mesh.export(file_type=kind, **options))
