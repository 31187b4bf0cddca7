"""glTF files are accounted for: unknown parts have a code at every level, damage costs itself."""

import copy
import io
import json
import os
import random

import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.core.errors import Reject
from pipeline.mesh_io.ignored_elements import IGNORED_ELEMENTS
from pipeline.mesh_io.load import load_with_report
from pipeline.mesh_io.readers.gltf_accounting import (
    READ_ATTRIBUTES,
    READ_EXTENSIONS,
    READ_PROPERTIES,
)
from tests.pipeline.mesh_files import FACES, TETRA, assert_same_triangles, glb, png, write
from tests.pipeline.mesh_io.gltf_files import BOX, BOX_FACES, CFG, GltfFile, codes


def full_file() -> GltfFile:
    """Return a file with at least one object of each kind that the reader knows."""
    file = GltfFile(
        extensionsUsed=["KHR_texture_transform"],
        extensionsRequired=[],
        scene=0,
        samplers=[{"wrapS": 10497}],
    )
    file.image(png(), sampler=0, extensions={"EXT_texture_webp": {"source": 0}})

    def info() -> dict:
        return {"index": 0, "extensions": {"KHR_texture_transform": {"scale": [1, 1]}}}

    specular = {"diffuseTexture": info(), "specularFactor": [0, 0, 0]}
    file.add(
        "materials",
        pbrMetallicRoughness={"baseColorTexture": info()},
        normalTexture={"index": 0, "scale": 1},
        occlusionTexture={"index": 0, "strength": 1},
        emissiveTexture=info(),
        extensions={
            "KHR_materials_emissive_strength": {"emissiveStrength": 1},
            "KHR_materials_pbrSpecularGlossiness": specular,
            "KHR_materials_unlit": {},
        },
    )
    sparse = {
        "count": 1,
        "indices": {"bufferView": file.view(b"\3\0\0\0"), "componentType": 5125},
        "values": {"bufferView": file.view(TETRA[3].tobytes())},
    }
    position = file.accessor(TETRA, bufferView=file.view(TETRA.tobytes()), sparse=sparse)
    joints = {"JOINTS_0": file.accessor(np.zeros((4, 4)), "u1"), "WEIGHTS_0": np.eye(4)[[0] * 4]}
    primitive = file.primitive(
        None,
        FACES,
        {"POSITION": position, "TEXCOORD_0": TETRA[:, :2]} | joints,
        material=0,
        targets=[{"POSITION": file.accessor(TETRA * 0)}],
    )
    bone = file.root(extensions={"KHR_node_visibility": {"visible": True}})
    skin = file.add("skins", joints=[bone])
    mesh = file.mesh(primitive, weights=[0])
    file.root(mesh=mesh, skin=skin, extensions={"MSFT_lod": {"ids": []}})
    return file


def places(document: dict) -> dict[str, dict]:
    """Return {kind: one object of the document of that kind}."""
    found = {}
    pending = [("document", document)]
    while pending:
        kind, data = pending.pop()
        if isinstance(data, list):
            pending += [(kind, item) for item in data]
        elif isinstance(data, dict):
            found[kind] = data
            for key, child in READ_PROPERTIES.get(kind, {}).items():
                if child and key in data:
                    pending.append((child, data[key]))
            for name, value in data.get("extensions", {}).items():
                pending.append((READ_EXTENSIONS[kind, name], value))
    return found


# Kinds of compressed data, which the other tests of this file do not contain.
COMPRESSED = {"draco", "draco attributes", "meshopt", "meshopt fallback"}
INSTANCING = {"instancing", "instancing attributes"}
KINDS = sorted({*READ_PROPERTIES, *READ_ATTRIBUTES} - COMPRESSED - INSTANCING)


def test_the_full_file_has_every_kind_and_no_warning(tmp_path):
    file = full_file()
    mesh, report = file.load(tmp_path)
    assert_same_triangles(mesh)
    assert report.warnings == ()
    assert set(KINDS) <= set(places(file.document))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(READ_ATTRIBUTES)))
def test_an_unknown_property_is_a_warning_at_each_level(tmp_path, kind):
    file = full_file()
    file.glb()  # adds the buffer
    places(file.document)[kind]["fancyProperty"] = {"a": 1}
    mesh, report = file.load(tmp_path)
    assert_same_triangles(mesh)
    assert codes(report) == {"unknown_element": 1}
    (warning,) = report.warnings
    assert warning.examples == (f"{kind}.fancyProperty",)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(READ_ATTRIBUTES)))
def test_an_unknown_extension_is_a_warning_at_each_level(tmp_path, kind):
    file = full_file()
    file.glb()
    place = places(file.document)[kind]
    place.setdefault("extensions", {})["EXT_fancy_thing"] = {"a": 1}
    mesh, report = file.load(tmp_path)
    assert_same_triangles(mesh)
    assert codes(report) == {"unknown_extension": 1}


@pytest.mark.parametrize("kind", ["attributes", "target"])
def test_an_unknown_attribute_is_a_warning(tmp_path, kind):
    file = full_file()
    places(file.document)[kind]["FANCY_0"] = 0
    mesh, report = file.load(tmp_path)
    assert_same_triangles(mesh)
    assert codes(report) == {"unknown_attribute": 1}


def test_an_unknown_attribute_of_instances_is_a_warning(tmp_path):
    file = GltfFile()
    attributes = {"TRANSLATION": file.accessor([[0, 0, 0]]), "TINT": file.accessor([[0, 0, 0]])}
    file.draw(file.primitive(), extensions={"EXT_mesh_gpu_instancing": {"attributes": attributes}})
    mesh, report = file.load(tmp_path)
    assert_same_triangles(mesh)
    assert codes(report) == {"unknown_attribute": 1}


@pytest.mark.parametrize("key", ["extensionsUsed", "extensionsRequired"])
def test_an_unknown_extension_in_the_lists_is_a_warning_and_no_rejection(tmp_path, key):
    file = GltfFile(**{key: ["EXT_fancy_thing"]})
    file.draw(file.primitive())
    mesh, report = file.load(tmp_path)
    assert_same_triangles(mesh)
    assert codes(report) == {"unknown_extension": 1}


def test_an_unknown_compression_is_reported_with_its_name(tmp_path):
    file = GltfFile(extensionsRequired=["EXT_fancy_compression"])
    position = file.add("accessors", componentType=5126, count=4, type="VEC3")
    primitive = file.primitive(None, None, {"POSITION": position})
    primitive["extensions"] = {"EXT_fancy_compression": {"bufferView": 0}}
    file.draw(file.primitive(), primitive)
    mesh, report = file.load(tmp_path)
    assert_same_triangles(mesh)
    assert codes(report) == {"unknown_extension": 1, "primitive_unreadable": 1}
    assert "EXT_fancy_compression" in str(report.warnings)


@pytest.mark.parametrize("name", sorted(IGNORED_ELEMENTS["gltf"]))
def test_listed_elements_change_nothing_and_give_no_warning(tmp_path, name):
    file = full_file()
    file.glb()
    plain, _ = file.load(tmp_path)
    found = places(file.document)
    if name.startswith("attribute "):
        found["attributes"][name.removeprefix("attribute ").replace("*", "7")] = 0
    elif "." in name:
        kind, _, key = name.partition(".")
        found[kind][key] = 1
    elif name[:2].isupper() or name[:3].isupper():
        real_name = name.replace("*", "thing")
        found["node"].setdefault("extensions", {})[real_name] = {"a": 1}
        file.document["extensionsUsed"].append(real_name)
    else:
        for kind, place in found.items():
            if kind not in READ_ATTRIBUTES:
                place[name] = "text"
    mesh, report = file.load(tmp_path)
    np.testing.assert_array_equal(mesh.vertices, plain.vertices)
    np.testing.assert_array_equal(mesh.faces, plain.faces)
    assert report.warnings == ()


def test_a_required_extension_of_the_look_never_costs_geometry(tmp_path):
    names = [name for _, name in READ_EXTENSIONS if name.startswith("KHR_materials")]
    file = GltfFile(extensionsUsed=names, extensionsRequired=names)
    file.draw(file.primitive())
    mesh, report = file.load(tmp_path)
    assert_same_triangles(mesh)
    assert report.warnings == ()


# Damage


WRONG_VALUES = [None, True, -1, 10**9, 1.5, "text", [], {}, [None], [-1], [{}], {"a": 1}, 1e308]


def objects(value, found=None) -> list:
    """Return all objects and lists of a document."""
    found = [] if found is None else found
    if isinstance(value, (dict, list)):
        found.append(value)
        for child in value.values() if isinstance(value, dict) else value:
            objects(child, found)
    return found


def assert_sound_or_rejected(path) -> None:
    try:
        mesh, _ = load_with_report(path, CFG)
    except Reject as error:
        json.dumps(error.numbers)
        return
    assert np.isfinite(mesh.vertices).all()
    assert 0 <= mesh.faces.min() <= mesh.faces.max() < len(mesh.vertices)
    for part in mesh.parts:
        count = part.vertices.stop - part.vertices.start
        for array in (part.uv, part.emissive_uv, part.colors, part.normals):
            assert array is None or len(array) == count


def test_any_wrong_value_at_any_place_is_read_or_rejected(tmp_path):
    """Each value of the full document is replaced by each wrong one, or removed."""
    file = full_file()
    file.glb()
    count = len(objects(file.document))
    for number in range(count):
        place = objects(file.document)[number]
        for key in list(place) if isinstance(place, dict) else range(len(place)):
            # A third of the values for each place, another third for the next one.
            for wrong in WRONG_VALUES[(number + len(str(key))) % 3 :: 3]:
                document = copy.deepcopy(file.document)
                objects(document)[number][key] = wrong
                assert_sound_or_rejected(write(tmp_path / "a.glb", glb(document, file.data)))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_bytes_are_read_or_rejected(tmp_path_factory, data):
    file = full_file()
    content = bytearray(file.glb())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(12, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    if data.draw(st.booleans()):
        content = content[:cut]
    assert_sound_or_rejected(write(tmp_path_factory.getbasetemp() / "fuzz.glb", bytes(content)))


@pytest.mark.parametrize("kind", ["accessor", "view", "sparse", "offset", "stride", "buffer"])
def test_huge_claims_are_rejected_or_cost_themselves(tmp_path, kind):
    huge = 2**40
    file = GltfFile()
    file.draw(file.primitive(), file.primitive(TETRA + 5))
    accessor, view = file.document["accessors"][2], file.document["bufferViews"][2]
    if kind == "accessor":
        accessor["count"] = huge
    elif kind == "view":
        view["byteLength"] = huge
    elif kind == "sparse":
        accessor["sparse"] = {
            "count": huge,
            "indices": {"bufferView": 0, "componentType": 5125},
            "values": {"bufferView": 0},
        }
    elif kind == "offset":
        accessor["byteOffset"] = huge
    elif kind == "stride":
        view["byteStride"] = huge
    else:
        file.document["buffers"] = [{"byteLength": huge}]
    with pytest.raises(Reject) as caught:
        file.load(tmp_path)
    assert caught.value.reason in ("allocation_bomb", "too_many_faces")


def test_a_deeply_nested_document_is_rejected(tmp_path):
    text = '{"asset": {"version": "2.0"}, "extras": ' + "[" * 200_000 + "]" * 200_000 + "}"
    with pytest.raises(Reject) as caught:
        load_with_report(write(tmp_path / "a.gltf", text), CFG)
    assert caught.value.reason == "unreadable"


# Files of another library's writer


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_random_scenes_written_by_another_library_are_read_as_they_are(tmp_path_factory, seed):
    """trimesh writes meshes, colours, textures and a hierarchy of transforms."""
    generator = np.random.default_rng(seed)
    chooser = random.Random(seed)
    scene = trimesh.Scene()
    names = [None]
    expected = []
    for number in range(chooser.randint(1, 4)):
        shape = chooser.choice(
            [
                trimesh.creation.box(generator.uniform(0.5, 2, 3)),
                trimesh.creation.icosphere(1, generator.uniform(0.5, 2)),
                trimesh.creation.cylinder(0.5, 1, sections=7),
                trimesh.Trimesh(TETRA, FACES, process=False),
            ]
        )
        look = chooser.choice(["none", "vertex", "texture"])
        color = tuple(generator.integers(0, 256, 3).tolist())
        if look == "vertex":
            colors = generator.integers(0, 256, (len(shape.vertices), 4), dtype=np.uint8)
            shape.visual = trimesh.visual.ColorVisuals(shape, vertex_colors=colors)
        elif look == "texture":
            image = Image.new("RGB", (2, 2), color)
            material = trimesh.visual.material.PBRMaterial(baseColorTexture=image)
            uv = generator.random((len(shape.vertices), 2))
            shape.visual = trimesh.visual.TextureVisuals(uv=uv, material=material)
        matrix = trimesh.transformations.random_rotation_matrix(generator.random(3))
        matrix[:3, 3] = generator.uniform(-5, 5, 3)
        matrix[:3, :3] *= generator.uniform(0.5, 2)
        parent = chooser.choice(names)
        name = scene.add_geometry(
            shape, node_name=f"node {number}", parent_node_name=parent, transform=matrix
        )
        names.append(name)
        world, _ = scene.graph[name]
        vertices = shape.vertices @ world[:3, :3].T + world[:3, 3]
        expected.append((vertices[shape.faces], look, color))
    file = io.BytesIO()
    scene.export(file, file_type="glb")
    path = write(tmp_path_factory.getbasetemp() / f"random{os.getpid()}.glb", file.getvalue())
    mesh, report = load_with_report(path, CFG)
    assert report.warnings == ()

    corners = np.concatenate([triangles for triangles, _, _ in expected])
    found = mesh.vertices[mesh.faces]
    assert len(found) == len(corners)
    np.testing.assert_allclose(found.min(axis=(0, 1)), corners.min(axis=(0, 1)), atol=1e-4)
    np.testing.assert_allclose(found.max(axis=(0, 1)), corners.max(axis=(0, 1)), atol=1e-4)
    areas = [
        np.linalg.norm(np.cross(t[:, 1] - t[:, 0], t[:, 2] - t[:, 0]), axis=1).sum()
        for t in (found, corners)
    ]
    assert areas[0] == pytest.approx(areas[1], rel=1e-4)
    volumes = [np.einsum("fi,fi->", t[:, 0], np.cross(t[:, 1], t[:, 2])) for t in (found, corners)]
    assert volumes[0] == pytest.approx(volumes[1], rel=1e-3, abs=1e-3)
    textures = {
        tuple(part.material.texture[0, 0, :3].tolist())
        for part in mesh.parts
        if part.material.texture is not None
    }
    assert textures == {color for _, look, color in expected if look == "texture"}
    assert any(part.colors is not None for part in mesh.parts) == any(
        look == "vertex" for _, look, _ in expected
    )


def test_the_test_data_is_what_it_says():
    """The box of the tests has volume 1 and faces outward."""
    a, b, c = (BOX[BOX_FACES[:, k]].astype(float) for k in range(3))
    assert np.einsum("fi,fi->", a, np.cross(b, c)) / 6 == pytest.approx(1)


@pytest.mark.parametrize("name", ["KHR_techniques_webgl", "VRM"])
def test_looks_with_shaders_of_their_own_are_reported(tmp_path, name):
    file = GltfFile(extensionsUsed=[name], extensions={name: {"materialProperties": []}})
    file.draw(file.primitive())
    mesh, report = file.load(tmp_path)
    assert_same_triangles(mesh)
    assert codes(report) == {"appearance_ignored": 1}
