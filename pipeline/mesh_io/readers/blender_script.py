"""Open a file in Blender and export what is visible of it as GLB.

Blender or a Python interpreter with bpy runs this file in a process of its own:
`blender --background --python blender_script.py -- INPUT ROOT OUTPUT MAX_INSTANCES`. It imports
nothing of this project. Beside OUTPUT it writes OUTPUT.json: the number of placed objects, counted
up to MAX_INSTANCES + 1, and a list of [code, detail, count]. It writes no OUTPUT if there are more
than MAX_INSTANCES.
"""

import json
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import bpy  # pyright: ignore[reportMissingImports]

# Types of objects that Blender turns into polygons, and those that draw nothing.
WITH_POLYGONS = ("MESH", "CURVE", "SURFACE", "FONT", "META")
WITHOUT_SHAPE = ("EMPTY", "ARMATURE", "LATTICE", "CAMERA", "LIGHT", "LIGHT_PROBE", "SPEAKER")
# Nodes of materials that the exporter reads, or that have no look of their own.
READ_NODES = (
    *("BSDF_PRINCIPLED", "OUTPUT_MATERIAL", "EMISSION", "TEX_IMAGE", "UVMAP", "TEX_COORD"),
    *("MAPPING", "NORMAL_MAP", "SEPARATE_COLOR", "VERTEX_COLOR", "ATTRIBUTE", "RGB", "VALUE"),
    *("FRAME", "REROUTE"),
)
CODES = {"CURVES": "curves_left_out", "POINTCLOUD": "points_left_out"}
SHEAR_TOLERANCE = 1e-5  # of a matrix, relative to its largest value


def main(source: Path, root: Path, target: Path, max_instances: int) -> None:
    """Convert one file.

    Args:
        source: A blend or abc file.
        root: Directory of the files that may be used.
        target: The GLB file that is written.
        max_instances: Largest number of placed objects.
    """
    found: Counter[tuple[str, str]] = Counter()
    if source.suffix.lower() == ".abc":
        bpy.ops.wm.read_factory_settings(use_empty=True)
        if "FINISHED" not in bpy.ops.wm.alembic_import(
            filepath=str(source), as_background_job=False
        ):
            sys.exit(1)  # Blender has printed why
    else:
        bpy.ops.wm.open_mainfile(filepath=str(source), load_ui=False, use_scripts=False)
    check_files(root, found)  # first, because later steps draw what the files hold
    scene = bpy.context.scene
    scene.frame_set(scene.frame_start)
    for armature in bpy.data.armatures:
        armature.pose_position = "REST"
    check_objects(scene, found)
    check_materials(scene, found)
    graph = bpy.context.evaluated_depsgraph_get()
    drawn = (instance for instance in graph.object_instances if is_drawn(instance))
    count = sum(1 for _ in islice(drawn, max_instances + 1))
    if count <= max_instances:
        flatten(scene, graph, found)
        export(target, found)
    report = {
        "instances": count,
        "found": [[code, detail, number] for (code, detail), number in sorted(found.items())],
    }
    target.with_name(f"{target.name}.json").write_text(json.dumps(report), encoding="utf-8")


def is_drawn(instance: "bpy.types.DepsgraphObjectInstance") -> bool:
    """Return whether a render shows an object of the evaluated scene, and it can have a shape.

    Objects that nodes and particles place are drawn even if they are hidden where they stand.
    """
    parent = instance.parent
    if parent is None:
        hidden = instance.object.hide_render
    else:
        in_collection = parent.instance_type == "COLLECTION"
        hidden = parent.hide_render or (in_collection and instance.object.hide_render)
    return instance.show_self and not hidden and instance.object.type not in WITHOUT_SHAPE


def flatten(scene: "bpy.types.Scene", graph: "bpy.types.Depsgraph", found: Counter) -> None:
    """Replace the objects of a scene by meshes without modifiers, shape keys, parents and motion.

    The exporter evaluates some of these in another way than a render, or leaves them out.
    """
    originals = list(bpy.data.objects)
    meshes: dict[tuple[int, str], bpy.types.Mesh | None] = {}
    for instance in graph.object_instances:
        if not is_drawn(instance):
            continue
        item = instance.object
        if item.type not in WITH_POLYGONS:
            found[CODES.get(item.type, "unsupported_primitive"), f"{item.name}: {item.type}"] += 1
            continue
        # The data of an evaluated object keeps its address while the scene stays as it is.
        key = (item.data.as_pointer() if item.data else 0, item.name)
        if key not in meshes:
            meshes[key] = polygons_of(item, graph, found)
        mesh = meshes[key]
        if mesh is None:
            continue
        place(scene, item.name, mesh, instance.matrix_world.copy())
    bpy.data.batch_remove(originals)


def polygons_of(
    item: "bpy.types.Object", graph: "bpy.types.Depsgraph", found: Counter
) -> "bpy.types.Mesh | None":
    """Return the mesh of an evaluated object with its materials, None if it has no polygons."""
    own_data = item.original.evaluated_get(graph).data
    if own_data and item.data.as_pointer() != own_data.as_pointer():
        # Nodes place meshes that belong to no object, with materials of their own.
        mesh = item.data.copy()
        materials = list(mesh.materials)
    else:
        mesh = bpy.data.meshes.new_from_object(item, preserve_all_data_layers=True, depsgraph=graph)
        materials = [slot.material for slot in item.material_slots]  # of the object or its data
    if not len(mesh.polygons):
        if len(mesh.edges):
            found["lines_left_out", item.name] += len(mesh.edges)
        elif len(mesh.vertices):
            found["points_left_out", item.name] += len(mesh.vertices)
        bpy.data.meshes.remove(mesh)
        return None
    for index, material in enumerate(materials):
        original = material.original if material else None
        if index < len(mesh.materials):
            mesh.materials[index] = original
        else:
            mesh.materials.append(original)
    return mesh


def place(scene: "bpy.types.Scene", name: str, mesh: "bpy.types.Mesh", matrix) -> None:
    """Add a mesh to a scene. What an object cannot express, such as shear, moves the vertices."""
    placed = bpy.data.objects.new(name, mesh)
    scene.collection.objects.link(placed)
    if mesh.shape_keys:
        placed.shape_key_clear()  # the vertices stand where the keys moved them
    placed.matrix_world = matrix
    largest = max(abs(value) for row in matrix for value in row)
    differences = (placed.matrix_basis - matrix) if largest else ()
    if any(abs(value) > SHEAR_TOLERANCE * largest for row in differences for value in row):
        placed.data = mesh.copy()
        placed.data.transform(matrix)
        if matrix.determinant() < 0:
            placed.data.flip_normals()
        placed.matrix_basis.identity()


def export(target: Path, found: Counter) -> None:
    """Write the scene as GLB. If the exporter fails at the materials, they are left out."""
    options = {
        "filepath": str(target),
        "export_format": "GLB",
        "use_active_scene": True,
        "export_animations": False,
        "export_skins": False,
        "export_morph": False,
        "export_yup": True,
    }
    try:
        bpy.ops.export_scene.gltf(**options)
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if not line.startswith("Location:")]
        found["material_unreadable", f"the exporter failed: {lines[-1][:120]}"] += 1
        bpy.ops.export_scene.gltf(**options, export_materials="NONE")


def check_files(root: Path, found: Counter) -> None:
    """Remove what comes from files outside the root, and report it and files that are missing.

    The files are images, linked libraries, caches of animations, volumes and fonts.
    """
    removed = []
    for image in bpy.data.images:
        if image.source not in ("FILE", "SEQUENCE", "TILED") or image.packed_file:
            continue
        name = image.filepath.replace("<UDIM>", str(image.tiles[0].number)) if image.tiles else ""
        path = Path(bpy.path.abspath(name or image.filepath, library=image.library)).resolve()
        if not path.is_relative_to(root) or not path.is_file():
            found["side_file_missing", image.filepath] += 1
            removed.append(image)
        elif image.source == "TILED":
            found["appearance_ignored", f"{image.name}: tiles"] += 1
    # `blend_links` rejects links to files outside the root before Blender opens them. Links that it
    # does not know are removed here.
    for item in (*bpy.data.libraries, *bpy.data.cache_files, *bpy.data.volumes, *bpy.data.fonts):
        if item.filepath in ("", "<builtin>") or getattr(item, "packed_file", None):
            continue
        library = item.parent if isinstance(item, bpy.types.Library) else item.library
        path = Path(bpy.path.abspath(item.filepath, library=library)).resolve()
        if not path.is_relative_to(root) or not path.is_file():
            found["side_file_missing", item.filepath] += 1
            removed.append(item)
    bpy.data.batch_remove(removed)


def check_objects(scene: "bpy.types.Scene", found: Counter) -> None:
    """Report the objects and the particles of a scene that are left out."""
    for item in scene.objects:
        if item.type in WITHOUT_SHAPE:
            continue
        if item.hide_render or not item.visible_get():
            found["hidden_left_out", item.name] += 1
        for system in getattr(item, "particle_systems", ()):
            if system.settings.render_type not in ("OBJECT", "COLLECTION", "NONE"):
                found["unsupported_primitive", f"{item.name}: particles {system.name}"] += 1


def check_materials(scene: "bpy.types.Scene", found: Counter) -> None:
    """Report the nodes of drawn materials that the exporter does not read."""
    slots = [slot for item in scene.objects for slot in item.material_slots]
    for material in {slot.material.name: slot.material for slot in slots if slot.material}.values():
        for node in material.node_tree.nodes if material.use_nodes else ():
            if node.type not in READ_NODES:
                found["appearance_ignored", f"{material.name}: {node.type}"] += 1


if __name__ == "__main__":
    arguments = sys.argv[sys.argv.index("--") + 1 :]
    main(Path(arguments[0]), Path(arguments[1]).resolve(), Path(arguments[2]), int(arguments[3]))
