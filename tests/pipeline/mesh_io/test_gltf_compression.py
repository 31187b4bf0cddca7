"""Compressed glTF files: Draco, and both meshopt extensions with all modes and filters."""

from dataclasses import replace

import DracoPy
import meshopt
import numpy as np
import pytest

from pipeline.core.errors import Reject
from tests.pipeline.mesh_files import TETRA, assert_same_triangles
from tests.pipeline.mesh_io.gltf_files import (
    BOX,
    BOX_FACES,
    CFG,
    COMPONENTS,
    GltfFile,
    box_of,
    by_position,
    codes,
    volume,
)

MESHOPT = ["EXT_meshopt_compression", "KHR_meshopt_compression"]
UV = np.array([[x, y] for x in (0, 0.5) for y in (0, 0.25) for _ in range(2)], dtype="<f8")
COLORS = np.array([[32 * k, 255 - 32 * k, 7] for k in range(8)], dtype="u1")


# Draco


def draco_primitive(file: GltfFile, content: bytes, ids: dict[str, int], **fields) -> dict:
    """Return a compressed primitive of the box. Its accessors have no views."""
    shapes = {"POSITION": ("f4", 3), "TEXCOORD_0": ("f4", 2), "COLOR_0": ("u1", 3)}
    attributes = {}
    for name in ids:
        dtype, width = shapes[name]
        attributes[name] = file.add(
            "accessors",
            componentType=COMPONENTS[dtype],
            count=8,
            type=f"VEC{width}",
            normalized=dtype == "u1",
        )
    indices = file.add("accessors", componentType=5125, count=36, type="SCALAR")
    extension = {"bufferView": file.view(content), "attributes": ids}
    return {
        "attributes": attributes,
        "indices": indices,
        "extensions": {"KHR_draco_mesh_compression": extension},
    } | fields


def draco_box(**options) -> bytes:
    return DracoPy.encode(BOX, BOX_FACES, quantization_bits=14, **options)


def ids_of(content: bytes) -> dict[int, int]:
    """Return {attribute type of Draco: unique id}."""
    attributes = DracoPy.decode(content).attributes
    return {item["attribute_type"]: item["unique_id"] for item in attributes}


@pytest.mark.parametrize("mode", [None, 4, 5])  # the buffer of a strip holds triangles too
@pytest.mark.parametrize("preserve_order", [False, True])  # edgebreaker and sequential
def test_draco_primitives_are_decoded(tmp_path, preserve_order, mode):
    content = draco_box(preserve_order=preserve_order)
    file = GltfFile(extensionsRequired=["KHR_draco_mesh_compression"])
    fields = {} if mode is None else {"mode": mode}
    file.draw(draco_primitive(file, content, {"POSITION": ids_of(content)[0]}, **fields))
    mesh, report = file.load(tmp_path)
    np.testing.assert_allclose(box_of(mesh), [[0, 0, 0], [1, 1, 1]], atol=1e-3)
    assert volume(mesh) == pytest.approx(1, abs=1e-3)
    assert len(mesh.faces) == 12
    assert report.warnings == ()


def test_attributes_of_draco_are_found_by_their_unique_id(tmp_path):
    content = draco_box(tex_coord=UV, colors=COLORS)
    ids = ids_of(content)
    assert len(set(ids.values())) == 3
    file = GltfFile()
    look = file.add("materials")
    named = {"COLOR_0": ids[2], "TEXCOORD_0": ids[3], "POSITION": ids[0]}
    file.draw(draco_primitive(file, content, named, material=look))
    mesh, report = file.load(tmp_path)
    assert report.warnings == ()
    colors = by_position(mesh, mesh.parts[0].colors)
    linear = COLORS / 255
    srgb = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    for corner, expected in zip(BOX, np.rint(srgb * 255), strict=True):
        (found,) = (v for k, v in colors.items() if np.abs(np.subtract(k, corner)).max() < 1e-3)
        assert found[:3] == tuple(expected)


def test_a_broken_draco_buffer_costs_its_primitive(tmp_path):
    file = GltfFile()
    ids = {"POSITION": 0}
    whole = draco_box()
    bad = (b"", b"DRACO", whole[:30], b"JUNK" + whole[4:], whole[:60] + b"\xff" * 40)
    file.draw(file.primitive(), *(draco_primitive(file, content, ids) for content in bad))
    mesh, report = file.load(tmp_path)
    assert codes(report)["primitive_unreadable"] == len(bad)
    assert_same_triangles(mesh)


def test_a_broken_draco_buffer_beside_plain_data_is_not_needed(tmp_path):
    file = GltfFile()
    primitive = file.primitive()
    extension = {"bufferView": file.view(b"DRACO..."), "attributes": {"POSITION": 0}}
    primitive["extensions"] = {"KHR_draco_mesh_compression": extension}
    file.draw(primitive)
    assert_same_triangles(file.load(tmp_path)[0])


def test_an_unknown_id_in_a_draco_buffer_costs_its_primitive(tmp_path):
    file = GltfFile()
    file.draw(file.primitive(), draco_primitive(file, draco_box(), {"POSITION": 77}))
    mesh, report = file.load(tmp_path)
    assert_same_triangles(mesh)
    assert codes(report) == {"primitive_unreadable": 1}


# Metadata of a Draco buffer: one attribute with an entry, then the geometry with a block in it.
METADATA = bytes([1, 0, 1, 1, 65, 2, 7, 7, 0]) + bytes([0, 1, 1, 66, 1, 1, 67, 1, 9, 0])


def with_metadata(content: bytes) -> bytes:
    return content[:9] + b"\0\x80" + METADATA + content[11:]


@pytest.mark.parametrize("preserve_order", [False, True])
def test_metadata_in_a_draco_buffer_are_skipped(tmp_path, preserve_order):
    content = draco_box(preserve_order=preserve_order)
    file = GltfFile()
    file.draw(draco_primitive(file, with_metadata(content), {"POSITION": ids_of(content)[0]}))
    mesh, report = file.load(tmp_path)
    assert volume(mesh) == pytest.approx(1, abs=1e-3)
    assert report.warnings == ()


@pytest.mark.parametrize("metadata", [False, True])
@pytest.mark.parametrize("preserve_order", [False, True])
def test_counts_in_a_draco_buffer_are_checked_before_it_is_decoded(
    tmp_path, preserve_order, metadata
):
    content = draco_box(preserve_order=preserve_order)
    assert content[7:9] == bytes([1, not preserve_order])  # a mesh; the method
    place = 11 if preserve_order else 13  # of the number of faces
    assert content[place] == 12
    content = content[:place] + b"\xff\xff\xff\xff\x07" + content[place + 1 :]
    file = GltfFile()
    content = with_metadata(content) if metadata else content
    file.draw(draco_primitive(file, content, {"POSITION": 0}))
    with pytest.raises(Reject) as caught:
        file.load(tmp_path)
    assert (caught.value.reason, caught.value.numbers["faces"]) == ("too_many_faces", 2**31 - 1)


# Meshopt


def packed_view(
    file: GltfFile, name: str, rows: np.ndarray, mode: str, *, filter=None, version=0, content=None
) -> int:
    """Append a compressed view of rows. Its plain buffer does not exist."""
    rows = np.ascontiguousarray(rows)
    if content is None:
        content = meshopt.encode_gltf_buffer(rows, mode, version)
    number = file.view(content)
    place = file.document["bufferViews"][number]
    stride = rows.nbytes // len(rows)
    extension = place | {"byteStride": stride, "count": len(rows), "mode": mode}
    if filter is not None:
        extension["filter"] = filter
    view = {"buffer": 1, "byteLength": rows.nbytes, "extensions": {name: extension}}
    if mode == "ATTRIBUTES":
        view["byteStride"] = stride
    return file.add("bufferViews", **view)


def finish(file: GltfFile, name: str) -> None:
    file.document["buffers"] = [
        {"byteLength": len(file.data)},
        {"byteLength": 4096, "extensions": {name: {"fallback": True}}},
    ]


@pytest.mark.parametrize("name", MESHOPT)
@pytest.mark.parametrize("mode", ["TRIANGLES", "INDICES"])
@pytest.mark.parametrize("dtype", ["u2", "u4"])
def test_meshopt_attributes_and_indices_are_decoded(tmp_path, name, mode, dtype):
    file = GltfFile(extensionsUsed=[name], extensionsRequired=[name])
    version = 0 if name.startswith("EXT") else 1
    position = file.accessor(
        BOX, bufferView=packed_view(file, name, BOX, "ATTRIBUTES", version=version)
    )
    # The codec of triangles may turn each triangle, but keeps its orientation.
    indices = BOX_FACES.ravel().astype("<" + dtype)
    view = packed_view(file, name, indices, mode)
    primitive = {
        "attributes": {"POSITION": position},
        "indices": file.accessor(indices, dtype, bufferView=view),
    }
    file.draw(primitive)
    finish(file, name)
    mesh, report = file.load(tmp_path)
    assert box_of(mesh) == [[0, 0, 0], [1, 1, 1]]
    assert volume(mesh) == pytest.approx(1)
    assert report.warnings == ()


def test_the_exponential_filter_is_undone(tmp_path):
    name = MESHOPT[0]
    file = GltfFile()
    rows = meshopt.encode_filter_exp(BOX * 1.5, 15)
    view = packed_view(file, name, rows, "ATTRIBUTES", filter="EXPONENTIAL")
    position = file.accessor(BOX, bufferView=view)
    file.draw(file.primitive(None, BOX_FACES, {"POSITION": position}))
    finish(file, name)
    mesh, report = file.load(tmp_path)
    np.testing.assert_allclose(box_of(mesh), [[0, 0, 0], [1.5, 1.5, 1.5]], atol=1e-3)
    assert report.warnings == ()


@pytest.mark.parametrize(("dtype", "stride"), [("i1", 4), ("i2", 8)])
def test_the_octahedral_filter_is_undone(tmp_path, dtype, stride):
    name = MESHOPT[0]
    file = GltfFile()
    normals = (BOX - 0.5) * [1, 2, 3]
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    rows = meshopt.encode_filter_oct(np.column_stack([normals, np.ones(8)]), stride, 2 * stride)
    view = packed_view(file, name, rows, "ATTRIBUTES", filter="OCTAHEDRAL")
    normal = file.accessor(np.zeros((8, 3)), dtype, bufferView=view, normalized=True)
    file.draw(file.primitive(BOX, BOX_FACES, {"NORMAL": normal}))
    finish(file, name)
    mesh, report = file.load(tmp_path)
    found = by_position(mesh, mesh.parts[0].normals)
    for corner, expected in zip(BOX, normals, strict=True):
        np.testing.assert_allclose(found[tuple(corner)], expected, atol=0.02)
    assert report.warnings == ()


def test_the_quaternion_filter_is_undone(tmp_path):
    name = MESHOPT[0]
    file = GltfFile()
    turns = np.array([[0, 0, 0, 1], [0, 0, np.sqrt(0.5), np.sqrt(0.5)]])
    rows = meshopt.encode_filter_quat(turns, 8, 16)
    view = packed_view(file, name, rows, "ATTRIBUTES", filter="QUATERNION")
    rotation = file.accessor(np.zeros((2, 4)), "i2", bufferView=view, normalized=True)
    extension = {"EXT_mesh_gpu_instancing": {"attributes": {"ROTATION": rotation}}}
    file.draw(file.primitive(), extensions=extension)
    finish(file, name)
    mesh, report = file.load(tmp_path)
    np.testing.assert_allclose(box_of(mesh), [[-2, 0, 0], [1, 2, 3]], atol=1e-3)
    assert report.warnings == ()


def test_the_colour_filter_is_undone(tmp_path):
    name = MESHOPT[1]
    file = GltfFile()
    stored = np.tile([0.25, 0.5, 0.75, 1.0], (4, 1))
    rows = meshopt.encode_filter_color(stored, 4, 8)
    view = packed_view(file, name, rows, "ATTRIBUTES", filter="COLOR", version=1)
    color = file.accessor(np.zeros((4, 4)), "u1", bufferView=view, normalized=True)
    file.draw(file.primitive(attributes={"COLOR_0": color}))
    finish(file, name)
    mesh, report = file.load(tmp_path)
    # sRGB of 0.25, 0.5 and 0.75
    np.testing.assert_allclose(mesh.parts[0].colors, [[137, 188, 225, 255]] * 4, atol=2)
    assert report.warnings == ()


def test_a_broken_meshopt_view_costs_what_needs_it(tmp_path):
    name = MESHOPT[0]
    file = GltfFile()
    whole = meshopt.encode_gltf_buffer(BOX, "ATTRIBUTES", 0)
    bad = [b"", whole[:20], b"\x00" + whole[1:]]
    primitives = [
        file.primitive(
            None,
            BOX_FACES,
            {
                "POSITION": file.accessor(
                    BOX, bufferView=packed_view(file, name, BOX, "ATTRIBUTES", content=content)
                )
            },
        )
        for content in bad
    ]
    file.draw(file.primitive(), *primitives)
    finish(file, name)
    mesh, report = file.load(tmp_path)
    assert_same_triangles(mesh)
    assert codes(report) == {"primitive_unreadable": 3}


@pytest.mark.parametrize(
    "fields",
    [{"count": -1}, {"count": None}, {"byteStride": 3}, {"byteStride": 257}, {"buffer": 9}],
    ids=str,
)
def test_broken_fields_of_a_meshopt_view_cost_what_needs_it(tmp_path, fields):
    name = MESHOPT[0]
    file = GltfFile()
    view = packed_view(file, name, BOX, "ATTRIBUTES")
    file.document["bufferViews"][view]["extensions"][name] |= fields
    position = file.accessor(BOX, bufferView=view)
    file.draw(file.primitive(), file.primitive(None, BOX_FACES, {"POSITION": position}))
    finish(file, name)
    mesh, report = file.load(tmp_path)
    assert_same_triangles(mesh)
    assert codes(report)["primitive_unreadable"] == 1


def test_a_huge_count_of_a_meshopt_view_is_a_bomb(tmp_path):
    name = MESHOPT[0]
    file = GltfFile()
    view = packed_view(file, name, BOX, "ATTRIBUTES")
    file.document["bufferViews"][view]["extensions"][name]["count"] = 100_000_000
    position = file.accessor(BOX, bufferView=view)
    file.draw(file.primitive(None, BOX_FACES, {"POSITION": position}))
    finish(file, name)
    with pytest.raises(Reject) as caught:
        file.load(tmp_path)
    assert caught.value.reason == "allocation_bomb"


def test_unpacked_bytes_of_all_views_are_limited(tmp_path):
    name = MESHOPT[0]
    file = GltfFile()
    rows = np.zeros((1000, 3), dtype="<f4")
    rows[:4] = TETRA
    positions = [
        file.accessor(rows, bufferView=packed_view(file, name, rows, "ATTRIBUTES"))
        for _ in range(3)
    ]
    file.draw(*(file.primitive(None, attributes={"POSITION": number}) for number in positions))
    finish(file, name)
    assert len(file.load(tmp_path)[0].faces) == 12
    with pytest.raises(Reject) as caught:
        file.load(tmp_path, replace(CFG, max_unpacked_bytes=30_000))
    assert caught.value.reason == "allocation_bomb"
