"""Files that Blender converts. A small program stands in for it, unless BLENDER names one."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.errors import Reject
from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.load import load_with_report
from tests.pipeline.mesh_files import VALID_FILES, assert_same_triangles, write
from tests.pipeline.mesh_io.blend_files import blend_file
from tests.pipeline.mesh_io.measures import volume

BLEND = blend_file()


@pytest.fixture
def stand_in(tmp_path):
    """Return a function that writes a program with the given body and returns its path."""

    def make(body: str, name: str = "blender") -> str:
        (tmp_path / "scene.glb").write_bytes(VALID_FILES["glb"])
        program = tmp_path / name
        program.write_text(
            f"#!{sys.executable}\n"
            "import json, os, pathlib, sys\n"
            "arguments = sys.argv[1:]\n"
            "source, root, target, limit = arguments[arguments.index('--') + 1:]\n"
            f"scene = pathlib.Path({str(tmp_path / 'scene.glb')!r}).read_bytes()\n{body}\n",
            encoding="utf-8",
        )
        program.chmod(program.stat().st_mode | stat.S_IEXEC)
        return str(program)

    return make


CONVERT = """
pathlib.Path(target).write_bytes(scene)
report = {"instances": 1, "found": REPORT}
pathlib.Path(target + ".json").write_text(json.dumps(report))
"""


def load(tmp_path, blender: str, name: str = "a.blend", content: bytes = BLEND):
    path = write(tmp_path / name, content)
    mesh, report = load_with_report(path, LoadConfig(blender=blender))
    return mesh, {warning.code: warning for warning in report.warnings}


@pytest.mark.parametrize(("name", "content"), [("a.blend", BLEND), ("a.abc", b"Ogawa")])
def test_the_converted_scene_is_read(tmp_path, stand_in, name, content):
    mesh, codes = load(tmp_path, stand_in("REPORT = []" + CONVERT), name, content)
    assert_same_triangles(mesh)
    assert codes == {}


def test_scripts_are_disabled_and_the_script_gets_its_paths(tmp_path, stand_in):
    body = "pathlib.Path(root, 'arguments').write_text('\\n'.join(arguments))\nREPORT = []"
    load(tmp_path, stand_in(body + CONVERT))
    arguments = (tmp_path / "arguments").read_text(encoding="utf-8").split("\n")
    assert {"--background", "--factory-startup", "--disable-autoexec"} <= set(arguments)
    script = Path(arguments[arguments.index("--python") + 1])
    assert script.name == "blender_script.py"
    assert script.is_file()
    assert arguments[-4:-2] == [str(tmp_path / "a.blend"), str(tmp_path)]
    assert arguments[-1] == str(LoadConfig().max_instances)
    load(tmp_path, stand_in(body + CONVERT, "python3.11"))  # an interpreter with bpy
    arguments = (tmp_path / "arguments").read_text(encoding="utf-8").split("\n")
    assert arguments[:3] == ["-I", str(script), "--"]


def test_reports_and_messages_become_warnings(tmp_path, stand_in):
    body = """REPORT = [["hidden_left_out", "Sphere", 2]]
print("00:01.250  blend | Warning: the file is strange")
print("00:01.250  blend | Warning: the file is strange")
print("Info: nothing")
print('Warning: region type 4 missing in space type "Info" (id: 7) - removing region')
print(f"Error: cannot read {source}")
print(f"Warning: image <struct at {hex(id(source))}>")
"""
    _, codes = load(tmp_path, stand_in(body + CONVERT))
    assert codes["hidden_left_out"].count == 2
    assert codes["converter_warning"].count == 3
    assert codes["converter_warning"].examples == (
        "the file is strange",
        "cannot read /a.blend",
        "image <struct>",
    )
    with pytest.raises(Reject, match="message=EXCEPTION: no such object"):
        load(tmp_path, stand_in('print("ERROR: EXCEPTION:")\nprint("no such object")'))
    assert set(codes) == {"hidden_left_out", "converter_warning"}


def test_more_instances_than_allowed_are_rejected(tmp_path, stand_in):
    body = """
report = {"instances": int(limit) + 1, "found": []}
pathlib.Path(target + ".json").write_text(json.dumps(report))
"""
    with pytest.raises(Reject, match=r"too_many_faces instances=20001 max_instances=20000"):
        load(tmp_path, stand_in(body))


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("sys.exit(1)", "blender"),
        ("print('Error: no DNA block')", "blender"),
        ("os.kill(os.getpid(), 11)", "blender"),
        ("import time; time.sleep(60)", "blender_timeout"),
    ],
)
def test_a_failed_conversion_costs_the_asset(tmp_path, stand_in, monkeypatch, body, error):
    if error == "blender_timeout":
        monkeypatch.setattr("pipeline.mesh_io.readers.blender.TIMEOUT_S", 1.0)
    with pytest.raises(Reject) as caught:
        load(tmp_path, stand_in(body))
    assert caught.value.reason == "unreadable"
    assert caught.value.numbers["error"] == error


def test_a_blender_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(Reject, match=r"--load.blender \S*/gone cannot be run"):
        load(tmp_path, str(tmp_path / "gone"))


@pytest.mark.parametrize("name", ["a.blend", "a.abc"])
def test_other_content_is_rejected_before_blender_runs(tmp_path, name):
    with pytest.raises(Reject, match="wrong_magic"):
        load(tmp_path, "gone", name, b"hello")


def test_a_file_that_links_a_file_outside_is_rejected_before_blender_runs(tmp_path, stand_in):
    folder = tmp_path / "root"
    folder.mkdir()
    blender = stand_in(f"pathlib.Path({str(tmp_path / 'ran')!r}).touch()\nREPORT = []" + CONVERT)
    content = blend_file([("Library", "//../outside.blend")])
    load(folder, blender, content=content)
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    (tmp_path / "outside.blend").write_bytes(BLEND)
    with pytest.raises(Reject, match=r"error=file_outside_root .*name=//\.\./outside\.blend"):
        load(folder, blender, content=content)
    assert not (tmp_path / "ran").exists()


MAKE = """
import bpy, sys
bpy.ops.wm.read_factory_settings(use_empty=True)
bpy.ops.mesh.primitive_cube_add(size=2)
bpy.context.object.modifiers.new("twice", "ARRAY").relative_offset_displace = (2, 0, 0)
bpy.ops.mesh.primitive_cube_add(size=2, location=(0, 50, 0))
bpy.context.object.hide_render = True
script = bpy.data.texts.new("run.py")
script.write("open(%r, 'w').write('x')" % sys.argv[-2])
script.use_module = True
bpy.ops.wm.save_as_mainfile(filepath=sys.argv[-1])
"""


NEEDS_BLENDER = pytest.mark.skipif(
    "BLENDER" not in os.environ, reason="BLENDER does not name a Blender"
)


def run_blender(tmp_path, script: str, *arguments: str) -> str:
    """Run a script in Blender and return the program's path."""
    blender = os.environ["BLENDER"]
    (tmp_path / "make.py").write_text(script, encoding="utf-8")
    is_python = Path(blender).name.startswith("python")
    run = [blender] if is_python else [blender, "--background", "--python"]
    command = [*run, str(tmp_path / "make.py"), "--", *arguments]
    subprocess.run(command, check=True, capture_output=True)
    return blender


@NEEDS_BLENDER
def test_blender_converts_a_file_without_running_its_scripts(tmp_path):
    blender = run_blender(tmp_path, MAKE, str(tmp_path / "evil"), str(tmp_path / "a.blend"))
    mesh, report = load_with_report(tmp_path / "a.blend", LoadConfig(blender=blender))
    assert mesh.vertices.max(0).round(4).tolist() == [5, 1, 1]
    assert len(mesh.faces) == 24
    assert [warning.code for warning in report.warnings] == ["hidden_left_out"]
    assert not (tmp_path / "evil").exists()


LINK = """
import bpy, pathlib, sys
folder = pathlib.Path(sys.argv[-1])
for place, height in (("inside", 10), ("../outside", 90)):
    bpy.ops.wm.read_factory_settings(use_empty=True)
    bpy.ops.mesh.primitive_cube_add(size=2, location=(0, 0, height))
    bpy.context.object.name = place
    bpy.ops.wm.save_as_mainfile(filepath=str(folder / f"{place}.blend"))
bpy.ops.wm.read_factory_settings(use_empty=True)
bpy.ops.mesh.primitive_cube_add(size=2)
for place in ("inside", "../outside"):
    with bpy.data.libraries.load(str(folder / f"{place}.blend"), link=True) as (names, linked):
        linked.objects = names.objects
    bpy.context.collection.objects.link(linked.objects[0])
bpy.ops.wm.save_as_mainfile(filepath=str(folder / "a.blend"))
"""


@NEEDS_BLENDER
def test_linked_files_outside_the_root_are_never_read(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    cfg = LoadConfig(blender=run_blender(tmp_path, LINK, str(folder)))
    with pytest.raises(Reject, match="file_outside_root"):
        load_with_report(folder / "a.blend", cfg)
    (tmp_path / "outside.blend").unlink()
    mesh, report = load_with_report(folder / "a.blend", cfg)
    assert mesh.vertices.max(0).round(4).tolist() == [1, 11, 1]
    assert len(mesh.faces) == 24
    codes = {warning.code: warning.examples[0] for warning in report.warnings}
    assert codes["side_file_missing"].endswith("outside.blend")


@NEEDS_BLENDER
def test_damaged_alembic_files_are_unreadable_or_read(tmp_path):
    script = """
import bpy, sys
bpy.ops.wm.read_factory_settings(use_empty=True)
bpy.ops.mesh.primitive_cube_add(size=2, location=(0, 0, 4))
bpy.ops.wm.alembic_export(filepath=sys.argv[-1], as_background_job=False)
"""
    blender = run_blender(tmp_path, script, str(tmp_path / "a.abc"))
    mesh, report = load_with_report(tmp_path / "a.abc", LoadConfig(blender=blender))
    assert mesh.vertices.max(0).round(4).tolist() == [1, 5, 1]
    assert len(mesh.faces) == 12
    assert report.warnings == ()
    content = (tmp_path / "a.abc").read_bytes()
    for damaged in (content[: len(content) // 2], content[:16] + bytes(8) + content[24:]):
        (tmp_path / "b.abc").write_bytes(damaged)
        with pytest.raises(Reject, match=r"unreadable error=blender message=(Could not|Ogawa)"):
            load_with_report(tmp_path / "b.abc", LoadConfig(blender=blender))


SCENE = """
import bpy, math, sys
bpy.ops.wm.read_factory_settings(use_empty=True)
scene = bpy.context.scene

def cube(name, place):
    bpy.ops.mesh.primitive_cube_add(size=2, location=place)
    bpy.context.object.name = name
    return bpy.context.object

# A shape key at half of its way moves one cube by 5.
keyed = cube("keyed", (0, 0, 0))
keyed.shape_key_add(name="basis")
key = keyed.shape_key_add(name="far")
for point in key.data:
    point.co.x += 10
key.value = 0.5

# A child below a parent with different scales is sheared.
parent = cube("parent", (100, 0, 0))
parent.scale = (1, 1, 3)
child = cube("child", (0, 0, 0))
child.parent = parent
child.rotation_euler = (math.radians(45), 0, 0)

# Nodes place a cube of their own twice, in another material than the object has.
base = cube("nodes", (200, 0, 0))
base.data.materials.append(bpy.data.materials.new("of the object"))
red = bpy.data.materials.new("of the nodes")
red.use_nodes = True
red.node_tree.nodes["Principled BSDF"].inputs["Base Color"].default_value = (1, 0, 0, 1)
tree = bpy.data.node_groups.new("tree", "GeometryNodeTree")
tree.interface.new_socket("g", in_out="OUTPUT", socket_type="NodeSocketGeometry")
small, paint, line, instance, out = [
    tree.nodes.new(kind)
    for kind in ("GeometryNodeMeshCube", "GeometryNodeSetMaterial", "GeometryNodeMeshLine",
                 "GeometryNodeInstanceOnPoints", "NodeGroupOutput")
]
paint.inputs["Material"].default_value = red
line.inputs["Count"].default_value = 2
line.inputs["Offset"].default_value = (20, 0, 0)
tree.links.new(small.outputs["Mesh"], paint.inputs["Geometry"])
tree.links.new(line.outputs["Mesh"], instance.inputs["Points"])
tree.links.new(paint.outputs["Geometry"], instance.inputs["Instance"])
tree.links.new(instance.outputs["Instances"], out.inputs[0])
base.modifiers.new("nodes", "NODES").node_group = tree

# A collection that an empty places, and whose second cube no render shows.
group = bpy.data.collections.new("group")
for name, hidden in (("shown", False), ("hidden", True)):
    item = cube(name, (0, 0, 7 if hidden else 0))
    item.hide_render = hidden
    scene.collection.objects.unlink(item)
    group.objects.link(item)
empty = bpy.data.objects.new("empty", None)
empty.instance_type, empty.instance_collection, empty.location = "COLLECTION", group, (300, 0, 0)
scene.collection.objects.link(empty)

# The exporter cannot write a tiled image without files.
tiled = bpy.data.images.new("tiled", 4, 4, tiled=True)
tiled.filepath = "//gone.<UDIM>.png"
material = bpy.data.materials.new("tiled")
material.use_nodes = True
texture = material.node_tree.nodes.new("ShaderNodeTexImage")
texture.image = tiled
target = material.node_tree.nodes["Principled BSDF"].inputs["Base Color"]
material.node_tree.links.new(texture.outputs["Color"], target)
keyed.data.materials.append(material)
bpy.ops.wm.save_as_mainfile(filepath=sys.argv[-1])
"""


@NEEDS_BLENDER
def test_the_evaluated_scene_is_read(tmp_path):
    """Shape keys, shear, instances of nodes and of collections, materials, a missing image."""
    blender = run_blender(tmp_path, SCENE, str(tmp_path / "a.blend"))
    mesh, report = load_with_report(tmp_path / "a.blend", LoadConfig(blender=blender))
    points = mesh.vertices[mesh.faces].reshape(-1, 3)

    def box(start: float) -> list[list[float]]:
        inside = points[(points[:, 0] > start - 50) & (points[:, 0] < start + 50)]
        return [inside.min(axis=0).round(3).tolist(), inside.max(axis=0).round(3).tolist()]

    assert box(0) == [[4, -1, -1], [6, 1, 1]]
    half = round(3 * 2**0.5, 3)  # of the turned cube along z, which is y here
    assert box(100) == [[99, -half, -1.414], [101, half, 1.414]]
    assert box(200) == [[199.5, -0.5, -0.5], [220.5, 0.5, 0.5]]
    assert box(300) == [[299, -1, -1], [301, 1, 1]]
    assert len(mesh.faces) == 12 * 6
    assert volume(mesh) == pytest.approx(8 + 24 + 24 + 2 * 1 + 8, rel=1e-5)  # all faces look out
    (nodes,) = [part for part in mesh.parts if 190 < mesh.vertices[part.vertices, 0].min() < 210]
    assert nodes.material.base_color == (1, 0, 0, 1)
    codes = {warning.code: warning.examples for warning in report.warnings}
    assert codes["side_file_missing"] == ("//gone.<UDIM>.png",)
    assert "hidden_left_out" not in codes  # the hidden cube is no object of the scene itself
