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
            "source, root, target = arguments[arguments.index('--') + 1:]\n"
            f"scene = pathlib.Path({str(tmp_path / 'scene.glb')!r}).read_bytes()\n{body}\n",
            encoding="utf-8",
        )
        program.chmod(program.stat().st_mode | stat.S_IEXEC)
        return str(program)

    return make


CONVERT = """
pathlib.Path(target).write_bytes(scene)
pathlib.Path(target + ".json").write_text(json.dumps(REPORT))
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
    assert arguments[-3:-1] == [str(tmp_path / "a.blend"), str(tmp_path)]
    load(tmp_path, stand_in(body + CONVERT, "python3.11"))  # an interpreter with bpy
    arguments = (tmp_path / "arguments").read_text(encoding="utf-8").split("\n")
    assert arguments[:3] == ["-I", str(script), "--"]


def test_reports_and_messages_become_warnings(tmp_path, stand_in):
    body = """REPORT = [["hidden_left_out", "Sphere", 2]]
print("00:01.250  blend | Warning: the file is strange")
print("Info: nothing")
print(f"Error: cannot read {source}")
"""
    _, codes = load(tmp_path, stand_in(body + CONVERT))
    assert codes["hidden_left_out"].count == 2
    assert codes["converter_warning"].examples == (
        "the file is strange",
        "cannot read /a.blend",
    )
    assert set(codes) == {"hidden_left_out", "converter_warning"}


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
