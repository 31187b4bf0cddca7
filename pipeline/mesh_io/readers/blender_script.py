"""Open a file in Blender and export what is visible of it as GLB.

Blender or a Python interpreter with bpy runs this file in a process of its own:
`blender --background --python blender_script.py -- INPUT ROOT OUTPUT`. It imports nothing of this
project. Beside OUTPUT it writes OUTPUT.json, a list of [code, detail, count].
"""

import json
import sys
from collections import Counter
from pathlib import Path

import bpy  # pyright: ignore[reportMissingImports]

# Types of objects that the exporter turns into polygons, and those that draw nothing.
EXPORTED = ("MESH", "CURVE", "SURFACE", "FONT", "META")
WITHOUT_SHAPE = ("EMPTY", "ARMATURE", "LATTICE", "CAMERA", "LIGHT", "LIGHT_PROBE", "SPEAKER")
# Nodes of materials that the exporter reads, or that have no look of their own.
READ_NODES = (
    *("BSDF_PRINCIPLED", "OUTPUT_MATERIAL", "EMISSION", "TEX_IMAGE", "UVMAP", "TEX_COORD"),
    *("MAPPING", "NORMAL_MAP", "SEPARATE_COLOR", "VERTEX_COLOR", "ATTRIBUTE", "RGB", "VALUE"),
    *("FRAME", "REROUTE"),
)
CODES = {"CURVES": "curves_left_out", "POINTCLOUD": "points_left_out"}


def main(source: Path, root: Path, target: Path) -> None:
    """Convert one file.

    Args:
        source: A blend or abc file.
        root: Directory of the files that may be used.
        target: The GLB file that is written.
    """
    found: Counter[tuple[str, str]] = Counter()
    if source.suffix.lower() == ".abc":
        bpy.ops.wm.read_factory_settings(use_empty=True)
        bpy.ops.wm.alembic_import(filepath=str(source), as_background_job=False)
    else:
        bpy.ops.wm.open_mainfile(filepath=str(source), load_ui=False, use_scripts=False)
    check_files(root, found)  # first, because later steps draw what the files hold
    scene = bpy.context.scene
    scene.frame_set(scene.frame_start)
    for armature in bpy.data.armatures:
        armature.pose_position = "REST"
    check_objects(scene, found)
    check_materials(scene, found)
    bpy.ops.export_scene.gltf(
        filepath=str(target),
        export_format="GLB",
        use_visible=True,
        use_renderable=True,
        use_active_scene=True,
        export_apply=True,  # modifiers
        export_animations=False,
        export_skins=False,
        export_morph=False,
        export_yup=True,
    )
    report = [[code, detail, count] for (code, detail), count in sorted(found.items())]
    target.with_name(f"{target.name}.json").write_text(json.dumps(report), encoding="utf-8")


def check_files(root: Path, found: Counter) -> None:
    """Remove what comes from files outside the root, and report it and files that are missing.

    The files are images, linked libraries, caches of animations, volumes and fonts.
    """
    for image in bpy.data.images:
        if image.source not in ("FILE", "SEQUENCE", "TILED") or image.packed_file:
            continue
        path = Path(bpy.path.abspath(image.filepath, library=image.library)).resolve()
        if not path.is_relative_to(root) or not path.is_file():
            found["side_file_missing", image.filepath] += 1
            image.filepath = ""
        elif image.source == "TILED":
            found["appearance_ignored", f"{image.name}: tiles"] += 1
    # `blend_links` rejects links to files outside the root before Blender opens them. Links that it
    # does not know are removed here.
    removed = []
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
    """Report the objects of a scene that the exporter leaves out."""
    for item in scene.objects:
        if item.type in WITHOUT_SHAPE:
            continue
        if item.hide_render or not item.visible_get():
            found["hidden_left_out", item.name] += 1
        elif item.type not in EXPORTED:
            code = CODES.get(item.type, "unsupported_primitive")
            found[code, f"{item.name}: {item.type}"] += 1
        for system in getattr(item, "particle_systems", ()):
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
    main(Path(arguments[0]), Path(arguments[1]).resolve(), Path(arguments[2]))
