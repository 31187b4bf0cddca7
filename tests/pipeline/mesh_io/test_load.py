"""Loading of valid files, which is exact, and of damaged files, which have the right reason."""

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import Reject
from pipeline.core.schema import Material
from pipeline.mesh_io.assemble import assemble
from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.load import load, load_with_report
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.scene import Attribute, Geometry, Scene
from pipeline.sources.procedural import make_shape
from pipeline.sources.shapes import to_glb
from tests.child_python import project_environment, run_python
from tests.pipeline.mesh_files import (
    FACES,
    OBJ,
    OFF,
    PLY,
    TETRA,
    VALID_FILES,
    assert_same_triangles,
    dae,
    glb,
    gltf,
    gltf_material,
    png,
    stl,
    threemf,
    write,
    zipped,
)

CFG = LoadConfig()


def reject(path: Path, cfg: LoadConfig = CFG) -> Reject:
    with pytest.raises(Reject) as caught:
        load(path, cfg)
    return caught.value


@pytest.mark.parametrize("name", VALID_FILES)
def test_every_format_gives_the_same_tetrahedron(tmp_path, name):
    mesh, report = load_with_report(write(tmp_path / f"a.{name}", VALID_FILES[name]), CFG)
    assert_same_triangles(mesh)
    assert mesh.vertices.dtype == np.float64
    assert mesh.faces.dtype == np.int32
    assert report.warnings == ()
    assert [part.faces for part in mesh.parts] == [slice(0, 4)]
    assert (mesh.center, mesh.scale) == ((0.0, 0.0, 0.0), 1.0)


@pytest.mark.parametrize("name", VALID_FILES)
def test_upper_case_extensions_are_accepted(tmp_path, name):
    assert_same_triangles(load(write(tmp_path / f"A.{name.upper()}", VALID_FILES[name]), CFG))


def test_z_up_files_are_rotated_with_their_normals(tmp_path):
    mesh = load(write(tmp_path / "a.stl", stl()), CFG, up="z")
    assert_same_triangles(mesh, TETRA[:, [0, 2, 1]] * [1, 1, -1])
    normals = Attribute(values=TETRA / np.maximum(np.linalg.norm(TETRA, axis=1), 1)[:, None])
    scene = Scene.of_geometries([Geometry.from_triangles(TETRA, FACES, normals=normals)])
    plain, turned = (assemble(scene, CFG, WarningLog(), up) for up in ("y", "z"))
    np.testing.assert_allclose(
        turned.parts[0].normals, plain.parts[0].normals[:, [0, 2, 1]] * [1, 1, -1], atol=1e-7
    )
    path = write(tmp_path / "a.glb", VALID_FILES["glb"])  # the format states that y is up
    assert_same_triangles(load(path, CFG, up="z"))
    with pytest.raises(ValueError, match='up must be "auto", "y" or "z"'):
        load(path, CFG, up="x")


def test_node_transforms_are_applied_and_mirrored_faces_stay_outward(tmp_path):
    nodes = [
        {"children": [1, 2], "translation": [10, 0, 0]},
        {"mesh": 0, "scale": [2, 1, 1]},
        {"mesh": 0, "scale": [-1, 1, 1]},
    ]
    mesh = load(write(tmp_path / "a.glb", glb(*gltf(nodes=nodes))), CFG)
    assert len(mesh.faces) == 8
    assert len(mesh.parts) == 1  # one appearance, one part
    corners = mesh.vertices[mesh.faces]
    volumes = (
        np.einsum("fi,fi->f", corners[:, 0] - [10, 0, 0], np.cross(corners[:, 1], corners[:, 2]))
        / 6
    )
    assert volumes.sum() == pytest.approx(3.0)  # 2 + 1: a mirrored solid counts positive
    np.testing.assert_allclose(mesh.vertices.min(axis=0), [9, 0, 0])
    np.testing.assert_allclose(mesh.vertices.max(axis=0), [12, 2, 3])


def test_normals_are_transformed_by_an_uneven_scale(tmp_path):
    data = to_glb(make_shape("0-gem"))
    (size,) = struct.unpack_from("<I", data, 12)
    document = json.loads(data[20 : 20 + size])
    document["nodes"] = [{"mesh": 0, "scale": [3, -1, 0.5]}]
    mesh = load(write(tmp_path / "a.glb", glb(document, data[28 + size :])), CFG)
    corners = mesh.vertices[mesh.faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    assert (normals[:, None] * mesh.parts[0].normals[mesh.faces]).sum(axis=2).min() > 0.999


def test_materials_textures_and_coordinates_are_read(tmp_path):
    look = gltf_material([0.5, 1, 1, 0.25], 0.2, 0.6, alphaMode="MASK", alphaCutoff=0.3)
    image = png((10, 200, 30, 128))
    mesh, report = load_with_report(
        write(tmp_path / "a.glb", glb(*gltf(material=look, image=image))), CFG
    )
    (part,) = mesh.parts
    material = part.material
    assert material.texture.shape == (4, 4, 4)
    assert (material.texture == [10, 200, 30, 128]).all()
    np.testing.assert_allclose(material.base_color, [0.5, 1, 1, 0.25], atol=1 / 255)
    assert (material.metallic, material.roughness) == (0.2, 0.6)
    assert (material.alpha_mode, material.alpha_cutoff, material.double_sided) == (
        "MASK",
        0.3,
        False,
    )
    expected = {
        (0, 0, 0): (0, 1),
        (1, 0, 0): (1, 1),
        (0, 2, 0): (0, 0),
        (0, 0, 3): (1, 0),
    }  # v = 0 at the bottom
    assert {tuple(p): tuple(uv) for p, uv in zip(mesh.vertices, part.uv, strict=True)} == expected
    assert report.warnings == ()


def test_a_file_without_material_has_the_default_one(tmp_path):
    (part,) = load(write(tmp_path / "a.stl", stl()), CFG).parts
    assert part.material == Material()
    assert (part.uv, part.colors, part.normals) == (None, None, None)


def test_linear_vertex_colours_of_gltf_become_srgb(tmp_path):
    colors = np.array([[0, 0, 0, 1], [1, 1, 1, 1], [0.2158605, 0.0, 0.0, 1], [0.5, 0.5, 0.5, 0.5]])
    for material in (None, {}):
        document, data = gltf(colors=colors, material=material)
        if material is not None:
            document["meshes"][0]["primitives"][0]["material"] = 0
        mesh = load(write(tmp_path / "a.glb", glb(document, data)), CFG)
        by_position = {
            tuple(p): tuple(c)
            for p, c in zip(mesh.vertices, mesh.parts[0].colors.tolist(), strict=True)
        }
        assert by_position[1, 0, 0] == (255, 255, 255, 255)
        np.testing.assert_allclose(by_position[0, 2, 0], [128, 0, 0, 255], atol=2)
        np.testing.assert_allclose(by_position[0, 0, 3], [188, 188, 188, 128], atol=2)


def test_vertex_colours_of_ply_are_srgb_already(tmp_path):
    text = PLY.replace(
        "property float z\n",
        "property float z\n" + "".join(f"property uchar {c}\n" for c in ("red", "green", "blue")),
    )
    lines = text.split("\n")
    start = lines.index("end_header") + 1
    for k in range(4):
        lines[start + k] += f" {10 * k} 128 255"
    mesh = load(write(tmp_path / "a.ply", "\n".join(lines)), CFG)
    by_position = {
        tuple(p): tuple(c)
        for p, c in zip(mesh.vertices, mesh.parts[0].colors.tolist(), strict=True)
    }
    assert by_position[0, 0, 3] == (30, 128, 255, 255)


def test_face_colours_split_the_corners(tmp_path):
    text = PLY.replace(
        "vertex_indices\n",
        "vertex_indices\nproperty uchar red\nproperty uchar green\nproperty uchar blue\n",
    )
    lines = text.rstrip("\n").split("\n")
    for k in range(4):
        lines[k - 4] += f" {60 * k} 0 9"
    mesh = load(write(tmp_path / "a.ply", "\n".join(lines) + "\n"), CFG)
    assert_same_triangles(mesh)
    (part,) = mesh.parts
    colors = part.colors[mesh.faces]
    assert (colors[..., 0] == 60 * np.arange(4)[:, None]).all()


def test_obj_material_and_texture_files_are_read(tmp_path):
    (tmp_path / "textures").mkdir()
    write(tmp_path / "textures" / "skin one.png", png((1, 2, 3, 255)))
    write(
        tmp_path / "a.mtl",
        "newmtl skin\nKd 1 1 1\nmap_Kd textures\\skin one.png\nnewmtl red\nKd 1 0 0\n",
    )
    lines = ["mtllib a.mtl", *OBJ.split("\n")[:4], "vt 0 0", "vt 1 0", "vt 0 1"]
    lines += ["usemtl skin", "f 1/1 3/2 2/3", "f 1/1 2/2 4/3", "usemtl red", "f 1 4 3", "f 2 3 4"]
    mesh, report = load_with_report(write(tmp_path / "a.obj", "\n".join(lines)), CFG)
    assert report.warnings == ()
    assert len(mesh.faces) == 4
    skin, red = sorted(mesh.parts, key=lambda part: part.material.texture is None)
    assert (skin.material.texture[..., :3] == [1, 2, 3]).all()
    assert skin.uv.shape == (skin.vertices.stop - skin.vertices.start, 2)
    assert red.material.base_color == (1.0, 0.0, 0.0, 1.0)
    covered = np.concatenate([np.arange(4)[part.faces] for part in mesh.parts])
    assert sorted(covered) == [0, 1, 2, 3]
    for part in mesh.parts:
        run = mesh.faces[part.faces]
        assert run.min() >= part.vertices.start
        assert run.max() < part.vertices.stop


def test_a_missing_texture_is_a_warning(tmp_path):
    write(tmp_path / "a.mtl", "newmtl skin\nmap_Kd gone.png\n")
    path = write(tmp_path / "a.obj", "mtllib a.mtl\nusemtl skin\n" + OBJ)
    mesh, report = load_with_report(path, CFG)
    assert_same_triangles(mesh)
    assert mesh.parts[0].material.texture is None
    assert "side_file_missing: gone.png" in [str(warning) for warning in report.warnings]


def test_a_broken_texture_is_a_warning(tmp_path):
    broken = png(size=(64, 64))[:60]
    mesh, report = load_with_report(write(tmp_path / "a.glb", glb(*gltf(image=broken))), CFG)
    assert_same_triangles(mesh)
    assert mesh.parts[0].material.texture is None
    assert report.warnings


def test_a_large_texture_is_scaled_down(tmp_path):
    path = write(tmp_path / "a.glb", glb(*gltf(image=png(size=(64, 16)))))
    mesh = load(path, replace(CFG, max_texture_side=32))
    assert mesh.parts[0].material.texture.shape == (8, 32, 4)


@pytest.mark.parametrize("kind", ["gltf", "glb"])
@pytest.mark.parametrize("uri", ["a%20b.bin", "x\\a b.bin", "../a%20b.bin"])
def test_buffers_in_side_files_are_found_and_counted_under_every_spelling(tmp_path, kind, uri):
    corners = np.random.default_rng(0).random((1000, 3))  # more bytes than the document
    faces = np.arange(999).reshape(-1, 3)
    document, data = gltf(vertices=corners, faces=faces)
    document["buffers"][0]["uri"] = uri
    write(tmp_path / "a b.bin", data)
    file = write(
        tmp_path / f"a.{kind}", json.dumps(document) if kind == "gltf" else glb(document, b"")
    )
    assert_same_triangles(load(file, CFG), corners, faces)


def test_a_buffer_is_never_read_from_above_the_folder(tmp_path):
    document, data = gltf()
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "a b.bin", data)
    write(tmp_path / "secret.bin", data)
    document["buffers"][0]["uri"] = "a%20b.bin"
    assert_same_triangles(load(write(tmp_path / "sub" / "a.gltf", json.dumps(document)), CFG))
    document["buffers"][0]["uri"] = "../secret.bin"
    assert reject(write(tmp_path / "sub" / "b.gltf", json.dumps(document))).reason == "unreadable"


def test_vertices_without_faces_and_collapsed_faces_are_dropped(tmp_path):
    vertices = np.concatenate([[[9, 9, 9]], TETRA, [[np.nan] * 3]])
    faces = np.concatenate([FACES + 1, [[1, 1, 2]]])
    mesh = load(write(tmp_path / "a.glb", glb(*gltf(vertices=vertices, faces=faces))), CFG)
    assert_same_triangles(mesh)
    assert len(mesh.vertices) == 4


def test_quads_and_polygons_become_triangles(tmp_path):
    text = "v 0 0 0\nv 2 0 0\nv 2 2 0\nv 0 2 0\nv 1 1 3\n"
    text += "f 4 3 2 1\nf 1 2 5\nf 2 3 5\nf 3 4 5\nf 4 1 5\n"
    mesh = load(write(tmp_path / "a.obj", text), CFG)
    corners = mesh.vertices[mesh.faces]
    assert len(mesh.faces) == 6
    assert np.einsum(
        "fi,fi->", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])
    ) / 6 == pytest.approx(4.0)


def test_negative_obj_indices_count_back_from_their_own_line(tmp_path):
    first, second = OBJ.split("\n")[:4], ["v 5 0 0", "v 6 0 0", "v 5 1 0", "v 5 0 1"]
    faces = [" ".join(str(int(i) - 4) for i in face) for face in FACES]
    text = "\n".join(
        [*first, *(f"f {face}" for face in faces), *second, *(f"f {face}" for face in faces)]
    )
    mesh = load(write(tmp_path / "a.obj", text), CFG)
    assert_same_triangles(replace(mesh, faces=mesh.faces[:4]))
    np.testing.assert_allclose(mesh.vertices.max(axis=0), [6, 2, 3])


def bomb(count: int, **fields) -> bytes:
    document, data = gltf()
    document["accessors"][0] |= {"count": count} | fields
    return glb(document, data)


def instances(count: int) -> bytes:
    nodes = [{"children": list(range(1, count + 1))}, *({"mesh": 0} for _ in range(count))]
    return glb(*gltf(nodes=nodes))


def overlapping_accessors() -> bytes:
    document, data = gltf()
    data += b"\0" * 1_000_000
    document["buffers"][0]["byteLength"] = len(data)
    document["bufferViews"].append({"buffer": 0, "byteLength": len(data)})
    accessor = {"bufferView": 2, "componentType": 5126, "count": 125_000, "type": "VEC2"}
    first = len(document["accessors"])
    document["accessors"] += [accessor] * 1000
    attributes = document["meshes"][0]["primitives"][0]["attributes"]
    attributes |= {f"TEXCOORD_{k}": first + k for k in range(1000)}
    return glb(document, data)


def nan_vertex() -> bytes:
    vertices = TETRA.copy()
    vertices[3, 1] = np.nan
    return glb(*gltf(vertices=vertices))


def draco() -> bytes:
    document, data = gltf()
    compressed = {"bufferView": 0, "attributes": {"POSITION": 0}}
    primitive = document["meshes"][0]["primitives"][0]
    primitive["extensions"] = {"KHR_draco_mesh_compression": compressed}
    del document["accessors"][0]["bufferView"]
    return glb(document, data)


def archive_bomb() -> bytes:
    return zipped({"3D/3dmodel.model": b"\0" * 5_000_000})


DAMAGED_FILES = {
    "empty file.glb": (b"", "empty_file"),
    "pointer.glb": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "lfs_pointer",
    ),
    "pointer.stl": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        "lfs_pointer",
    ),
    "page.glb": (b"<!DOCTYPE html><html>not found</html>", "wrong_magic"),
    "page.obj": (b"\n<html><body>404</body></html>", "wrong_magic"),
    "page.dae": (b"<HTML></HTML>", "wrong_magic"),
    "image.ply": (png(), "wrong_magic"),
    "text.3mf": (b"hello", "wrong_magic"),
    "text.off": (b"hello", "wrong_magic"),
    "text.gltf": (b"glTF", "wrong_magic"),
    "cut.glb": (VALID_FILES["glb"][:-40], "unreadable"),
    "cut header.glb": (VALID_FILES["glb"][:10], "unreadable"),
    "cut.gltf": (VALID_FILES["gltf"][:-30], "unreadable"),
    "cut.ply": (PLY[: PLY.index("end_header") + 30], "unreadable"),
    "cut header.ply": (PLY[:60], "unreadable"),
    "cut header.stl": (stl()[:50], "unreadable"),
    "cut.off": (OFF[:40], "unreadable"),
    "cut.3mf": (threemf()[:-50], "unreadable"),
    "cut.fbx": (VALID_FILES["fbx"][:400], "unreadable"),
    "page.fbx": (b"<html></html>", "wrong_magic"),
    "no model.fbx": (b"solid cube\n", "wrong_magic"),
    "old.fbx": (b"; FBX 5.8.0 project file\n", "unsupported_version"),
    "deep.fbx": (b"; FBX 7.4.0 project file\n" + b"a: {\n" * 100_000, "unreadable"),
    "claims.fbx": (
        VALID_FILES["fbx"].replace(b"d\x0c\0\0\0\1", b"d\0\0\0\x7f\1"),
        "allocation_bomb",
    ),
    "cut.dae": (dae()[:700], "unreadable"),
    "no dae.zae": (zipped({"readme.txt": b"hello"}), "unreadable"),
    "version 1.glb": (b"glTF\1\0\0\0" + VALID_FILES["glb"][8:], "gltf_1"),
    "no scene.obj": (b"# nothing here\n", "empty_scene"),
    "no scene.glb": (
        glb({"asset": {"version": "2.0"}, "scenes": [{}], "nodes": []}, b""),
        "empty_scene",
    ),
    "no triangles.stl": (stl(np.zeros((0, 3, 3))), "empty_scene"),
    "points.ply": (PLY.replace("face 4", "face 0").rsplit("\n", 5)[0] + "\n", "points_only"),
    "points.obj": (OBJ.split("\nf")[0], "points_only"),
    "nan.glb": (nan_vertex(), "non_finite_vertices"),
    "infinite.obj": (OBJ.replace("v 1.0", "v inf"), "non_finite_vertices"),
    "far index.glb": (glb(*gltf(faces=FACES + 4)), "index_out_of_range"),
    "bomb.glb": (bomb(400_000_000), "allocation_bomb"),
    "bomb without view.glb": (bomb(400_000_000, bufferView=0, byteOffset=0), "allocation_bomb"),
    "accessors.glb": (overlapping_accessors(), "allocation_bomb"),
    "bomb.ply": (PLY.replace("vertex 4", "vertex 400000000"), "allocation_bomb"),
    "bomb.stl": (stl(count=400_000_000), "allocation_bomb"),
    "bomb.off": (OFF.replace("4 4 0", "400000000 4 0"), "allocation_bomb"),
    "negative.off": (OFF.replace("4 4 0", "-4 4 0"), "unreadable"),
    "collapsed.obj": (b"v 0 0 0\nv 1 0 0\nf 1 1 2\nf 1 2 2\n", "degenerate"),
    "draco.glb": (draco(), "unreadable"),
    "instances.glb": (instances(25_000), "too_many_faces"),
}


@pytest.mark.parametrize("name", DAMAGED_FILES)
def test_a_damaged_file_is_rejected_with_its_reason(tmp_path, name):
    data, reason = DAMAGED_FILES[name]
    found = reject(write(tmp_path / name, data))
    assert found.reason == reason
    json.dumps(found.numbers)  # the manifest stores it
    assert str(tmp_path) not in str(found)  # it must not depend on the machine


def test_a_missing_file_or_a_directory_is_unreadable(tmp_path):
    (tmp_path / "folder.glb").mkdir()
    for name in ("gone.glb", "folder.glb"):
        found = reject(tmp_path / name)
        assert found.reason == "unreadable"
        assert str(tmp_path) not in str(found)


def test_an_accessor_without_a_view_that_claims_too_much_is_a_bomb(tmp_path):
    document, data = gltf()
    del document["accessors"][0]["bufferView"]
    document["accessors"][0] |= {"count": 400_000_000, "sparse": {"count": 1}}
    assert reject(write(tmp_path / "a.glb", glb(document, data))).reason == "allocation_bomb"


def test_an_archive_with_too_many_unpacked_bytes_is_rejected(tmp_path):
    cfg = replace(CFG, max_unpacked_bytes=4_000_000)
    assert reject(write(tmp_path / "a.3mf", archive_bomb()), cfg).reason == "allocation_bomb"


def test_too_many_faces_are_rejected_with_and_without_instances(tmp_path):
    for name, data in (
        ("a.stl", stl()),
        ("a.ply", PLY),
        ("a.off", OFF),
        ("a.obj", OBJ),
        ("a.glb", glb(*gltf())),
    ):
        found = reject(write(tmp_path / name, data), replace(CFG, max_faces=3))
        assert (found.reason, found.numbers["faces"]) == ("too_many_faces", 4)
    found = reject(write(tmp_path / "b.glb", instances(10)), replace(CFG, max_faces=39))
    assert (found.reason, found.numbers["faces"]) == ("too_many_faces", 40)
    assert len(load(tmp_path / "b.glb", replace(CFG, max_faces=40)).faces) == 40


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(VALID_FILES)), st.data())
def test_every_damaged_file_is_loaded_or_rejected(tmp_path_factory, name, data):
    """A truncated or changed file gives a finite mesh with valid indices, or a Reject."""
    whole = VALID_FILES[name].encode() if isinstance(VALID_FILES[name], str) else VALID_FILES[name]
    place = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        damaged = whole[:place]
    else:
        damaged = whole[:place] + bytes([data.draw(st.integers(0, 255))]) + whole[place + 1 :]
    path = write(tmp_path_factory.getbasetemp() / f"damaged.{name}", damaged)
    try:
        mesh = load(path, CFG)
    except Reject:
        return
    assert np.isfinite(mesh.vertices).all()
    assert 0 <= mesh.faces.min() <= mesh.faces.max() < len(mesh.vertices)


def test_the_order_of_parts_does_not_depend_on_the_process(tmp_path):
    """Hash seeds and generated names differ between processes. The result must not."""
    path = write(tmp_path / "house.glb", to_glb(make_shape("0014-house")))
    code = "import sys; from tests.pipeline.mesh_io.test_load import digest; "
    code += "print(digest(sys.argv[1]))"
    other = run_python("-c", code, path, env=project_environment(PYTHONHASHSEED="1"))
    assert other.stdout.strip() == digest(str(path))


def digest(path: str) -> str:
    mesh = load(Path(path), CFG)
    return hashlib.sha256(
        mesh.vertices.tobytes() + mesh.faces.tobytes() + repr(mesh.parts).encode()
    ).hexdigest()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_collada_file_in_any_unicode_encoding_is_read(tmp_path, encoding):
    text = (
        VALID_FILES["dae"] if isinstance(VALID_FILES["dae"], str) else VALID_FILES["dae"].decode()
    )
    name = encoding.removesuffix("-sig")
    text = f'<?xml version="1.0" encoding="{name}"?>' + text.partition("?>")[2]
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    mesh, report = load_with_report(write(tmp_path / "a.dae", mark + text.encode(encoding)), CFG)
    assert_same_triangles(mesh)
    assert report.warnings == ()
