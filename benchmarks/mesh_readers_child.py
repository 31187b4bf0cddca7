"""Read mesh files with one library and print what came out, one JSON line a file.

`python benchmarks/mesh_readers_child.py READER` takes paths from standard input. It runs in the
environment of the library, so it imports nothing of this project unless READER is "ours". The
readers "assimp", "blender" and "trimesh" need assimp-py, bpy and trimesh.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(reader: str) -> None:
    """Read every path of standard input and print its result."""
    read = {"ours": ours, "assimp": assimp, "blender": blender, "trimesh": with_trimesh}[reader]
    for line in sys.stdin:
        path = line.rstrip("\n")
        try:
            result = read(Path(path))
        except Exception as error:  # noqa: BLE001  a library may raise anything on a damaged file
            result = {"error": f"{type(error).__name__}: {error}"[:200]}
        sys.stdout.write(json.dumps({"path": path, **result}) + "\n")
        sys.stdout.flush()


def measures(corners: np.ndarray, textures: int | None, warnings: list[str]) -> dict[str, Any]:
    """Describe a surface by numbers that do not depend on the order of its triangles.

    Args:
        corners: [F, 3, 3], the corners of all triangles.
        textures: Number of distinct base colour images, None if the library does not tell them
            from others.
        warnings: What the reader says about the file.
    """
    sides = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    doubled = np.linalg.norm(sides, axis=1)
    # Zero-area triangles are dropped by some readers and kept by others.
    longest = float(np.ptp(corners.reshape(-1, 3), axis=0).max()) if len(corners) else 0.0
    kept = corners[doubled > 1e-12 * longest**2]
    if not len(kept):
        return {"error": "no triangles"}
    points = kept.reshape(-1, 3)
    return {
        "triangles": len(kept),
        "area": float(doubled.sum() / 2),
        "low": points.min(axis=0).tolist(),
        "high": points.max(axis=0).tolist(),
        "textures": textures,
        "warnings": warnings,
    }


def ours(path: Path) -> dict[str, Any]:
    """Read with this project."""
    from pipeline.core.errors import Reject
    from pipeline.mesh_io.config import LoadConfig
    from pipeline.mesh_io.load import load_with_report

    try:
        cfg = LoadConfig(blender=os.environ.get("BLENDER", ""))
        mesh, report = load_with_report(path, cfg, root=Path(path.anchor))
    except Reject as verdict:
        return {"error": str(verdict)[:200]}
    textures = {id(p.material.texture) for p in mesh.parts if p.material.texture is not None}
    return measures(mesh.vertices[mesh.faces], len(textures), [str(w) for w in report.warnings])


def assimp(path: Path) -> dict[str, Any]:
    """Read with assimp-py, all nodes transformed."""
    import assimp_py

    flags = assimp_py.Process_Triangulate | assimp_py.Process_PreTransformVertices
    scene = assimp_py.import_file(str(path), flags)
    corners = []
    used = set()
    for mesh in scene.meshes:
        vertices = np.array(mesh.vertices, dtype=np.float64).reshape(-1, 3)
        indices = np.array(mesh.indices, dtype=np.int64)
        if len(indices) != 3 * mesh.num_faces:
            continue  # points or lines
        corners.append(vertices[indices].reshape(-1, 3, 3))
        textures = scene.materials[mesh.material_index].get("TEXTURES", {})
        used |= {str(name) for kind in (1, 12) for name in textures.get(kind, ())}
    if not corners:
        return {"error": "no triangles"}
    return measures(np.concatenate(corners), len(used), [])


def with_trimesh(path: Path) -> dict[str, Any]:
    """Read with trimesh, all nodes transformed."""
    import trimesh

    scene = trimesh.load_scene(path, process=False)
    mesh = scene.to_geometry()
    if not isinstance(mesh, trimesh.Trimesh) or not len(mesh.faces):
        return {"error": "no triangles"}
    images = set()
    for geometry in scene.geometry.values():
        material = getattr(geometry.visual, "material", None)
        for name in ("image", "baseColorTexture"):
            image = getattr(material, name, None)
            images |= {id(image)} if image is not None else set()
    return measures(np.asarray(mesh.triangles, dtype=np.float64), len(images), [])


def blender(path: Path) -> dict[str, Any]:
    """Read with Blender (bpy). Its z-up frame is turned back to y up."""
    import bpy

    bpy.ops.wm.read_factory_settings(use_empty=True)
    suffix = path.suffix.lower()
    operators = {
        ".glb": "import_scene.gltf",
        ".gltf": "import_scene.gltf",
        ".obj": "wm.obj_import",
        ".ply": "wm.ply_import",
        ".stl": "wm.stl_import",
        ".dae": "wm.collada_import",
        **dict.fromkeys((".usd", ".usda", ".usdc", ".usdz"), "wm.usd_import"),
        ".fbx": "import_scene.fbx",
        ".abc": "wm.alembic_import",
        ".blend": "wm.open_mainfile",
    }
    if suffix not in operators:
        return {"error": "format not supported by Blender"}
    group, name = operators[suffix].split(".")
    if not hasattr(getattr(bpy.ops, group), name):
        return {"error": "format not supported by this Blender"}
    options: dict[str, Any] = {}
    if suffix in (".ply", ".stl"):
        options = {"up_axis": "Y", "forward_axis": "NEGATIVE_Z"}
    elif suffix.startswith(".usd"):  # the purposes and the cage that our reader draws, too
        options = {"import_guide": False, "import_proxy": False, "import_subdiv": False}
    elif suffix == ".blend":
        options = {"load_ui": False, "use_scripts": False}
    elif suffix == ".abc":
        options = {"as_background_job": False}
    getattr(getattr(bpy.ops, group), name)(filepath=str(path), **options)
    if suffix.startswith(".usd") or suffix in (".blend", ".abc"):
        # The first sample of animations, and the bind pose of skins.
        bpy.context.scene.frame_set(bpy.context.scene.frame_start)
        for armature in bpy.data.armatures:
            armature.pose_position = "REST"
    graph = bpy.context.evaluated_depsgraph_get()
    corners = []
    images: set[str] = set()
    for instance in graph.object_instances:
        drawn = ("MESH", "CURVE", "SURFACE", "FONT", "META") if suffix == ".blend" else ("MESH",)
        if instance.object.type not in drawn or instance.object.hide_render:
            continue
        images |= _base_color_images(instance.object)
        mesh = instance.object.to_mesh()
        mesh.calc_loop_triangles()
        positions = np.empty(3 * len(mesh.vertices))
        mesh.vertices.foreach_get("co", positions)
        indices = np.empty(3 * len(mesh.loop_triangles), dtype=np.int64)
        mesh.loop_triangles.foreach_get("vertices", indices)
        matrix = np.array(instance.matrix_world)
        world = positions.reshape(-1, 3) @ matrix[:3, :3].T + matrix[:3, 3]
        corners.append(world[indices].reshape(-1, 3, 3))
        instance.object.to_mesh_clear()
    if not corners or not sum(map(len, corners)):
        return {"error": "no triangles"}
    y_up = np.concatenate(corners)[..., [0, 2, 1]] * [1, 1, -1]
    return measures(y_up, len(images) if suffix.startswith(".usd") else None, [])


def _base_color_images(blender_object: Any) -> set[str]:
    """Return the names of the images that give the base colours of a Blender object."""
    names = set()
    for slot in blender_object.material_slots:
        tree = slot.material.node_tree if slot.material and slot.material.use_nodes else None
        for node in tree.nodes if tree else ():
            if node.type != "BSDF_PRINCIPLED":
                continue
            pending = [link.from_node for link in node.inputs["Base Color"].links]
            while pending:
                source = pending.pop()
                image = getattr(source, "image", None)
                if image is not None and image.has_data | (image.size[0] > 0):
                    names.add(image.filepath or image.name)
                pending += [link.from_node for found in source.inputs for link in found.links]
    return names


if __name__ == "__main__":
    main(sys.argv[1])
