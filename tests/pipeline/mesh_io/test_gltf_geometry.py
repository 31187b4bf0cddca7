"""Geometry of glTF files: each class of fault against volumes, areas and boxes known by hand."""

import time
from dataclasses import replace

import numpy as np
import pytest

from pipeline.core.errors import Reject
from pipeline.mesh_io.load import load_with_report
from tests.pipeline.mesh_files import FACES, TETRA, assert_same_triangles, glb, png, write
from tests.pipeline.mesh_io.gltf_files import (
    BOX,
    BOX_FACES,
    CFG,
    GltfFile,
    area,
    box_of,
    by_position,
    codes,
    volume,
)

SQUARE = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype="<f4")
UNIT_SQUARE = [[0, 0, 0], [1, 1, 0]]


def reject(file: GltfFile, folder, cfg=CFG) -> Reject:
    with pytest.raises(Reject) as caught:
        file.load(folder, cfg)
    return caught.value


def sparse(file: GltfFile, places, values, index_type="u2") -> dict:
    """Return the sparse part of an accessor of float32."""
    component = {"u1": 5121, "u2": 5123, "u4": 5125}[index_type]
    indices = np.asarray(places, dtype="<" + index_type)
    return {
        "count": len(places),
        "indices": {"bufferView": file.view(indices.tobytes()), "componentType": component},
        "values": {"bufferView": file.view(np.asarray(values, dtype="<f4").tobytes())},
    }


# Accessors


@pytest.mark.parametrize("index_type", ["u1", "u2", "u4"])
def test_sparse_values_replace_those_of_the_view(tmp_path, index_type):
    """The four corners at y = 1 are raised to y = 3."""
    file = GltfFile()
    raised = np.flatnonzero(BOX[:, 1] == 1)
    view = file.view(BOX.tobytes())
    position = file.accessor(
        BOX, bufferView=view, sparse=sparse(file, raised, BOX[raised] * [1, 3, 1], index_type)
    )
    file.draw(file.primitive(None, BOX_FACES, {"POSITION": position}))
    mesh, report = file.load(tmp_path)
    assert box_of(mesh) == [[0, 0, 0], [1, 3, 1]]
    assert volume(mesh) == pytest.approx(3)
    assert report.warnings == ()


def test_sparse_values_without_a_view_replace_zeros(tmp_path):
    file = GltfFile()
    position = file.accessor(BOX, sparse=sparse(file, range(1, 8), BOX[1:]))
    file.draw(file.primitive(None, BOX_FACES, {"POSITION": position}))
    mesh, report = file.load(tmp_path)
    assert volume(mesh) == pytest.approx(1)
    assert report.warnings == ()


def test_a_sparse_index_beyond_the_accessor_is_a_warning(tmp_path):
    file = GltfFile()
    position = file.accessor(
        BOX, bufferView=file.view(BOX.tobytes()), sparse=sparse(file, [8], BOX[:1])
    )
    file.draw(file.primitive(None, BOX_FACES, {"POSITION": position}))
    mesh, report = file.load(tmp_path)
    assert volume(mesh) == pytest.approx(1)
    assert codes(report) == {"invalid_value": 1}


def test_interleaved_attributes_are_read_with_their_stride(tmp_path):
    file = GltfFile()
    rows = np.hstack([BOX, -BOX]).astype("<f4")
    view = file.view(rows.tobytes(), byteStride=24)
    position = file.accessor(BOX, bufferView=view)
    normal = file.accessor(BOX, bufferView=view, byteOffset=12)
    file.draw(file.primitive(None, BOX_FACES, {"POSITION": position, "NORMAL": normal}))
    mesh, report = file.load(tmp_path)
    assert volume(mesh) == pytest.approx(1)
    normals = by_position(mesh, mesh.parts[0].normals)
    np.testing.assert_allclose(normals[1, 1, 1], -np.ones(3) / np.sqrt(3), atol=1e-6)
    assert report.warnings == ()


@pytest.mark.parametrize(
    ("dtype", "scale", "normalized"),
    [("i1", 127, True), ("u1", 255, True), ("i2", 32767, True), ("u2", 65535, True)]
    + [(dtype, 100, False) for dtype in ("i1", "u1", "i2", "u2")],
)
def test_quantised_positions_are_scaled(tmp_path, dtype, scale, normalized):
    file = GltfFile(extensionsRequired=["KHR_mesh_quantization"])
    width = 4 if dtype[1] == "1" else 8  # rows are padded to four bytes
    rows = np.zeros((8, width), dtype="<" + dtype)
    rows[:, :3] = BOX * scale
    size = rows.dtype.itemsize
    view = file.view(np.ascontiguousarray(rows[:, : width // size]).tobytes(), byteStride=width)
    position = file.accessor(np.zeros((8, 3)), dtype, bufferView=view, normalized=normalized)
    factor = 1 if normalized else 1 / scale
    file.draw(
        file.primitive(None, BOX_FACES, {"POSITION": position}), scale=[factor, factor, factor]
    )
    mesh, report = file.load(tmp_path)
    np.testing.assert_allclose(box_of(mesh), [[0, 0, 0], [1, 1, 1]], atol=1e-6)
    assert volume(mesh) == pytest.approx(1)
    assert report.warnings == ()


# Primitives


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(
    ("mode", "corners", "triangles"),
    [
        (4, [0, 1, 2, 0, 2, 3], 2),
        (5, [0, 1, 3, 2], 2),
        (5, [0, 1, 3, 2, 2], 2),  # the last triangle has no area
        (6, [0, 1, 2, 3], 2),
    ],
)
def test_triangles_strips_and_fans_cover_a_square(tmp_path, mode, corners, triangles, indexed):
    file = GltfFile()
    if indexed:
        file.draw(file.primitive(SQUARE, corners, mode=mode))
    else:
        file.draw(file.primitive(SQUARE[corners], None, mode=mode))
    mesh, report = file.load(tmp_path)
    assert len(mesh.faces) == triangles
    assert box_of(mesh) == UNIT_SQUARE
    assert area(mesh) == pytest.approx(1)
    a, b, c = (mesh.vertices[mesh.faces[:, k]] for k in range(3))
    assert (np.cross(b - a, c - a)[:, 2] > 0).all()  # all faces show their front
    assert report.warnings == ()


def test_a_long_strip_has_one_orientation(tmp_path):
    strip = [[x, y, 0] for x in range(6) for y in (1, 0)]
    file = GltfFile()
    file.draw(file.primitive(strip, None, mode=5))
    mesh, _ = file.load(tmp_path)
    a, b, c = (mesh.vertices[mesh.faces[:, k]] for k in range(3))
    np.testing.assert_allclose(np.cross(b - a, c - a), [[0, 0, 1]] * 10)


@pytest.mark.parametrize(
    ("mode", "code", "count"),
    [
        (0, "points_left_out", 4),
        (1, "lines_left_out", 2),
        (2, "lines_left_out", 4),
        (3, "lines_left_out", 3),
        (7, "unsupported_primitive", 1),
    ],
)
def test_points_and_lines_are_left_out_with_a_warning(tmp_path, mode, code, count):
    file = GltfFile()
    file.draw(file.primitive(), file.primitive(SQUARE, None, mode=mode))
    mesh, report = file.load(tmp_path)
    assert_same_triangles(mesh)
    assert codes(report) == {code: count}


def test_a_file_with_points_only_is_rejected_by_that_name(tmp_path):
    file = GltfFile()
    file.draw(file.primitive(SQUARE, None, mode=0))
    found = reject(file, tmp_path)
    assert (found.reason, found.numbers["points"]) == ("points_only", 4)


def test_compressed_points_without_data_are_points(tmp_path):
    file = GltfFile(extensionsRequired=["EXT_fancy_splats"])
    position = file.add("accessors", componentType=5126, count=7, type="VEC3")
    primitive = file.primitive(None, None, {"POSITION": position}, mode=0)
    file.draw(primitive | {"extensions": {"EXT_fancy_splats": {"bufferView": 0}}})
    found = reject(file, tmp_path)
    assert (found.reason, found.numbers["points"]) == ("points_only", 7)


def test_corners_that_make_no_triangle_are_a_warning(tmp_path):
    file = GltfFile()
    file.draw(file.primitive(SQUARE, [0, 1, 2, 3]), file.primitive(SQUARE, [0, 1], mode=5))
    mesh, report = file.load(tmp_path)
    assert area(mesh) == pytest.approx(0.5)
    assert codes(report) == {"count_mismatch": 2}


def broken_primitives() -> dict[str, tuple]:
    """Return {what is broken: function that breaks a primitive of a file}."""

    def change(name, **fields):
        def apply(file, primitive):
            number = primitive["attributes" if name == "POSITION" else name]
            number = number["POSITION"] if name == "POSITION" else number
            file.document["accessors"][number] |= fields

        return apply

    def without_positions(file, primitive):
        primitive["attributes"] = {"NORMAL": primitive["attributes"]["POSITION"]}

    return {
        "no POSITION": without_positions,
        "attributes are no object": lambda file, primitive: primitive.update(attributes=3),
        "POSITION is text": lambda file, p: p["attributes"].update(POSITION="0"),
        "POSITION does not exist": lambda file, p: p["attributes"].update(POSITION=99),
        "POSITION has two components": change("POSITION", type="VEC2"),
        "POSITION leaves its view": change("POSITION", byteOffset=8),
        "POSITION has an unknown type": change("POSITION", type="VEC9"),
        "POSITION has an unknown component": change("POSITION", componentType=1),
        "POSITION has a view that does not exist": change("POSITION", bufferView=99),
        "POSITION has a negative count": change("POSITION", count=-1),
        "indices do not exist": lambda file, primitive: primitive.update(indices=99),
        "indices are negative": lambda file, primitive: primitive.update(indices=-1),
        "indices leave their view": change("indices", count=37),
        "indices are vectors": change("indices", type="VEC3", count=4),
    }


@pytest.mark.parametrize("name", broken_primitives())
def test_a_broken_primitive_costs_itself(tmp_path, name):
    file = GltfFile()
    broken = file.primitive(BOX, BOX_FACES)
    broken_primitives()[name](file, broken)
    file.draw(file.primitive(), broken, file.primitive(TETRA + 5))
    mesh, report = file.load(tmp_path)
    assert len(mesh.faces) == 8
    assert volume(mesh) == pytest.approx(2)
    assert codes(report)["primitive_unreadable"] == 1
    assert set(codes(report)) <= {"primitive_unreadable", "invalid_value"}


def test_a_file_with_broken_primitives_only_is_unreadable(tmp_path):
    file = GltfFile()
    file.draw(file.primitive(None))
    found = reject(file, tmp_path)
    assert found.reason == "unreadable"
    assert "no POSITION" in found.numbers["message"]


def test_faces_with_indices_out_of_range_cost_themselves(tmp_path):
    file = GltfFile()
    file.draw(file.primitive(TETRA, [*FACES, [0, 1, 4]]))
    mesh, report = file.load(tmp_path)
    assert_same_triangles(mesh)
    assert codes(report) == {"index_out_of_range": 1}


def test_attributes_that_do_not_fit_are_left_out(tmp_path):
    file = GltfFile()
    attributes = {
        "NORMAL": TETRA[:3],
        "TEXCOORD_0": file.accessor(TETRA),  # three components
        "COLOR_0": 99,
        "TEXCOORD_1": TETRA[:, :2],
    }
    file.draw(file.primitive(attributes=attributes))
    mesh, report = file.load(tmp_path)
    assert_same_triangles(mesh)
    assert mesh.parts[0].normals is None
    assert codes(report) == {"attribute_mismatch": 3}


# Morph targets


def morphed(**fields) -> tuple[GltfFile, dict]:
    """A box with two targets: one raises the top to y = 3, one moves everything along x."""
    file = GltfFile()
    top = np.where(BOX[:, 1:2] == 1, [[0, 2, 0]], [[0, 0, 0]])
    targets = [{"POSITION": file.accessor(top)}, {"POSITION": file.accessor(BOX * 0 + [4, 0, 0])}]
    return file, file.primitive(BOX, BOX_FACES, targets=targets) | fields


@pytest.mark.parametrize(
    ("of_mesh", "of_node", "expected"),
    [
        (None, None, [[0, 0, 0], [1, 1, 1]]),
        ([1, 0], None, [[0, 0, 0], [1, 3, 1]]),
        ([0.5, 0.25], None, [[1, 0, 0], [2, 2, 1]]),
        ([1, 0], [0, 1], [[4, 0, 0], [5, 1, 1]]),
        ([1, 0], [0, 0], [[0, 0, 0], [1, 1, 1]]),
    ],
)
def test_morph_targets_have_the_default_weights(tmp_path, of_mesh, of_node, expected):
    file, primitive = morphed()
    mesh = file.mesh(primitive, **({} if of_mesh is None else {"weights": of_mesh}))
    file.root(mesh=mesh, **({} if of_node is None else {"weights": of_node}))
    result, report = file.load(tmp_path)
    assert box_of(result) == expected
    assert report.warnings == ()


def test_two_nodes_may_show_one_mesh_with_different_weights(tmp_path):
    file, primitive = morphed()
    mesh = file.mesh(primitive, weights=[1, 0])
    file.root(mesh=mesh)
    file.root(mesh=mesh, weights=[0, 1])
    result, _ = file.load(tmp_path)
    assert box_of(result) == [[0, 0, 0], [5, 3, 1]]
    assert volume(result) == pytest.approx(3 + 1)


def test_a_sparse_morph_target_changes_normals_and_coordinates(tmp_path):
    file = GltfFile()
    target = {
        "POSITION": file.accessor(TETRA, sparse=sparse(file, [1], [[2, 0, 0]])),
        "NORMAL": file.accessor(np.tile([0, 1, -1], (4, 1))),
        "TEXCOORD_0": file.accessor(np.full((4, 2), 0.25)),
        "COLOR_0": file.accessor(np.tile([-1, 0, 0], (4, 1))),
    }
    look = file.add("materials", pbrMetallicRoughness={"baseColorTexture": {"index": 0}})
    file.image(png())
    attributes = {
        "NORMAL": np.tile([0, 0, 1], (4, 1)),
        "TEXCOORD_0": np.zeros((4, 2)),
        "COLOR_0": np.ones((4, 4)),
    }
    primitive = file.primitive(attributes=attributes, targets=[target], material=look)
    file.root(mesh=file.mesh(primitive, weights=[1]))
    mesh, report = file.load(tmp_path)
    assert report.warnings == ()
    assert box_of(mesh) == [[0, 0, 0], [3, 2, 3]]
    part = mesh.parts[0]
    np.testing.assert_allclose(part.normals, np.tile([0, 1, 0], (4, 1)))
    np.testing.assert_allclose(part.uv, np.tile([0.25, 0.75], (4, 1)))
    assert (part.colors == [0, 255, 255, 255]).all()
    assert report.warnings == ()


def test_a_broken_morph_target_is_left_out(tmp_path):
    file, primitive = morphed()
    primitive["targets"][0]["POSITION"] = file.accessor(BOX[:3])
    file.root(mesh=file.mesh(primitive, weights=[1, 1]))
    mesh, report = file.load(tmp_path)
    assert box_of(mesh) == [[4, 0, 0], [5, 1, 1]]
    assert codes(report) == {"morph_unreadable": 1}


def test_weights_without_targets_are_a_warning(tmp_path):
    file = GltfFile()
    file.root(mesh=file.mesh(file.primitive(), weights=[1, 1]))
    mesh, report = file.load(tmp_path)
    assert_same_triangles(mesh)
    assert codes(report) == {"count_mismatch": 1}


# Instances


def instanced(file: GltfFile, *primitives, **attributes) -> dict:
    numbers = {name: file.accessor(values) for name, values in attributes.items()}
    return {
        "mesh": file.mesh(*primitives),
        "extensions": {"EXT_mesh_gpu_instancing": {"attributes": numbers}},
    }


def test_instances_are_drawn_with_their_transforms(tmp_path):
    file = GltfFile(extensionsUsed=["EXT_mesh_gpu_instancing"])
    half_turn = [0, 0, 1, 0]  # about z
    node = instanced(
        file,
        file.primitive(BOX, BOX_FACES),
        TRANSLATION=[[0, 0, 0], [3, 0, 0], [6, 0, 0]],
        ROTATION=[[0, 0, 0, 1], [0, 0, 0, 1], half_turn],
        SCALE=[[1, 1, 1], [1, 2, 1], [1, 1, -1]],
    )
    file.root(**node, translation=[10, 0, 0], scale=[1, 1, 2])
    mesh, report = file.load(tmp_path)
    assert len(mesh.faces) == 36
    assert box_of(mesh) == [[10, -1, -2], [16, 2, 2]]
    assert volume(mesh) == pytest.approx(2 * (1 + 2 + 1))  # a mirrored box counts positive
    assert report.warnings == ()


def test_instances_do_not_multiply_the_children_of_their_node(tmp_path):
    file = GltfFile()
    node = instanced(file, file.primitive(), TRANSLATION=[[0, 0, 0], [9, 0, 0]])
    child = file.add("nodes", mesh=node["mesh"])
    file.root(**node, children=[child])
    mesh, _ = file.load(tmp_path)
    assert len(mesh.faces) == 4 * 3


def test_normalised_rotations_of_instances_are_scaled(tmp_path):
    file = GltfFile()
    quarter = np.rint(np.array([[0, 0, 1, 1]]) * 32767 / np.sqrt(2))
    rotation = file.accessor(quarter, "i2", normalized=True)
    extension = {"EXT_mesh_gpu_instancing": {"attributes": {"ROTATION": rotation}}}
    file.draw(file.primitive(), extensions=extension)
    mesh, _ = file.load(tmp_path)
    np.testing.assert_allclose(box_of(mesh), [[-2, 0, 0], [0, 1, 3]], atol=1e-3)


def test_attributes_of_instances_with_different_counts_are_a_warning(tmp_path):
    file = GltfFile()
    node = instanced(file, file.primitive(), TRANSLATION=[[0, 0, 0], [9, 0, 0]], SCALE=[[1, 1, 1]])
    file.root(**node)
    mesh, report = file.load(tmp_path)
    assert len(mesh.faces) == 4
    assert codes(report) == {"count_mismatch": 1}


def test_instances_count_against_the_limits_before_they_are_made(tmp_path):
    file = GltfFile()
    file.root(**instanced(file, file.primitive(), TRANSLATION=np.zeros((30, 3))))
    found = reject(file, tmp_path, replace(CFG, max_instances=29))
    assert (found.reason, found.numbers["instances"]) == ("too_many_faces", 30)
    assert reject(file, tmp_path, replace(CFG, max_faces=119)).numbers["faces"] == 120
    assert len(file.load(tmp_path, replace(CFG, max_faces=120))[0].faces) == 120


# Nodes and scenes


def test_a_file_without_scenes_shows_all_root_nodes(tmp_path):
    file = GltfFile()
    mesh = file.mesh(file.primitive())
    file.add("nodes", mesh=mesh, children=[1])
    file.add("nodes", mesh=mesh, translation=[5, 0, 0])
    file.add("nodes", mesh=mesh, translation=[0, 7, 0])
    result, report = file.load(tmp_path)
    assert len(result.faces) == 12
    assert box_of(result) == [[0, 0, 0], [6, 9, 3]]
    assert report.warnings == ()


@pytest.mark.parametrize(("default", "top"), [(None, 2), (0, 2), (1, 12)])
def test_the_default_scene_is_drawn_and_the_others_are_reported(tmp_path, default, top):
    file = GltfFile(**({} if default is None else {"scene": default}))
    mesh = file.mesh(file.primitive())
    file.root(mesh=mesh)
    other = file.add("nodes", mesh=mesh, translation=[0, 10, 0], name="other")
    file.document["scenes"].append({"nodes": [other]})
    result, report = file.load(tmp_path)
    assert result.vertices[:, 1].max() == top
    assert codes(report) == {"unplaced_geometry": 1}


def test_a_default_scene_that_does_not_exist_is_a_warning(tmp_path):
    file = GltfFile(scene=3)
    file.draw(file.primitive())
    mesh, report = file.load(tmp_path)
    assert_same_triangles(mesh)
    assert codes(report) == {"invalid_value": 1}


def test_a_mesh_that_no_node_draws_is_a_warning(tmp_path):
    file = GltfFile()
    file.draw(file.primitive())
    file.mesh(file.primitive(TETRA + 5))
    mesh, report = file.load(tmp_path)
    assert_same_triangles(mesh)
    assert codes(report) == {"unplaced_geometry": 1}


def test_hidden_nodes_are_left_out_with_all_below_them(tmp_path):
    file = GltfFile(extensionsUsed=["KHR_node_visibility"])
    file.draw(file.primitive(), extensions={"KHR_node_visibility": {"visible": True}})
    child = file.add("nodes", mesh=0)
    file.root(mesh=0, children=[child], extensions={"KHR_node_visibility": {"visible": False}})
    mesh, report = file.load(tmp_path)
    assert_same_triangles(mesh)
    assert codes(report) == {"hidden_left_out": 1}


def test_only_the_finest_level_of_detail_is_drawn(tmp_path):
    file = GltfFile(extensionsUsed=["MSFT_lod"])
    coarse = file.add("nodes", mesh=file.mesh(file.primitive(TETRA * 9)))
    file.draw(file.primitive(), extensions={"MSFT_lod": {"ids": [coarse]}})
    mesh, report = file.load(tmp_path)
    assert_same_triangles(mesh)
    assert report.warnings == ()


def test_deep_hierarchies_load_in_linear_time(tmp_path):
    """A chain of 20,000 nodes, each of which moves by 1 and draws nothing but the last."""
    count = 20_000
    file = GltfFile()
    file.document["nodes"] = [
        {"children": [k + 1], "translation": [1, 0, 0]} for k in range(count)
    ] + [{"mesh": file.mesh(file.primitive())}]
    file.document["scenes"] = [{"nodes": [0]}]
    start = time.process_time()
    mesh, report = file.load(tmp_path)
    assert time.process_time() - start < 20
    assert box_of(mesh) == [[count, 0, 0], [count + 1, 2, 3]]
    assert report.warnings == ()


def test_many_primitives_on_one_array_of_vertices_take_linear_time(tmp_path):
    """4,000 triangles of one array of 400,000 vertices, each a primitive of its own."""
    count = 4000
    corners = np.zeros((100 * count, 3), dtype="<f4")
    corners[: 3 * count] = np.random.default_rng(0).random((3 * count, 3))
    file = GltfFile()
    position = file.accessor(corners)
    view = file.view(np.arange(3 * count, dtype="<u4").tobytes())
    primitives = [
        {
            "attributes": {"POSITION": position, "TEXCOORD_0": position + 1, "COLOR_0": position},
            "indices": file.add(
                "accessors",
                bufferView=view,
                byteOffset=12 * k,
                componentType=5125,
                count=3,
                type="SCALAR",
            ),
        }
        for k in range(count)
    ]
    uv = file.accessor(corners[:, :2])
    for primitive in primitives:
        primitive["attributes"]["TEXCOORD_0"] = uv
    file.draw(*primitives)
    start = time.process_time()
    mesh, _ = file.load(tmp_path)
    assert time.process_time() - start < 20
    assert len(mesh.faces) == count
    assert len(mesh.vertices) == 3 * count
    expected = corners[: 3 * count].reshape(-1, 3, 3)
    np.testing.assert_array_equal(mesh.vertices[mesh.faces], expected)


@pytest.mark.parametrize(
    "children", [[[1], [0]], [[0]], [[1], [2], [0, 1]]], ids=["two", "itself", "three"]
)
def test_a_cycle_of_nodes_ends(tmp_path, children):
    file = GltfFile()
    mesh = file.mesh(file.primitive())
    file.document["nodes"] = [{"children": group, "mesh": mesh} for group in children]
    file.document["scenes"] = [{"nodes": [0]}]
    result, report = file.load(tmp_path)
    assert len(result.faces) == 4 * len(children)
    assert codes(report)["node_cycle"] >= 1


def test_a_node_with_two_parents_is_drawn_twice(tmp_path):
    file = GltfFile()
    shared = file.add("nodes", mesh=file.mesh(file.primitive()))
    file.root(children=[shared])
    file.root(children=[shared], translation=[4, 0, 0])
    mesh, _ = file.load(tmp_path)
    assert box_of(mesh) == [[0, 0, 0], [5, 2, 3]]
    assert len(mesh.faces) == 8


def test_nodes_that_double_at_each_level_are_too_many(tmp_path):
    file = GltfFile()
    mesh = file.mesh(file.primitive())
    file.document["nodes"] = [
        {"children": [2 * (k // 2) + 2, 2 * (k // 2) + 3]} for k in range(80)
    ] + [{"mesh": mesh}, {"mesh": mesh}]
    file.document["scenes"] = [{"nodes": [0]}]
    assert reject(file, tmp_path).reason == "too_many_faces"


@pytest.mark.parametrize(
    "fields",
    [
        {"matrix": [1, 2, 3]},
        {"matrix": "identity"},
        {"translation": [1, 2]},
        {"rotation": [0, 0, 0, "w"]},
        {"scale": [1, None, 1]},
        {"scale": 3},
        {"children": [99]},
        {"children": 5},
        {"children": [1, 1]},
        {"mesh": 7},
        {"mesh": "0"},
        {"weights": "none"},
    ],
    ids=str,
)
def test_a_broken_node_costs_at_most_itself(tmp_path, fields):
    file = GltfFile()
    file.draw(file.primitive(), file.primitive(TETRA + 5))
    file.add("nodes")
    file.root(**({"mesh": 0} | fields))
    mesh, report = file.load(tmp_path)
    assert volume(mesh) in (pytest.approx(2), pytest.approx(4))
    assert codes(report)["invalid_value"] >= 1


def test_rotations_of_any_length_turn_without_scaling(tmp_path):
    file = GltfFile()
    file.draw(file.primitive(), rotation=[0, 0, 5, 5])
    file.draw(file.primitive(np.add(TETRA, [9, 0, 0])), rotation=[0, 0, 0, 0])
    mesh, _ = file.load(tmp_path)
    assert volume(mesh) == pytest.approx(2)
    assert mesh.vertices[:, 0].min() == pytest.approx(-2)


# Skins


def test_several_sets_of_joints_and_missing_weights(tmp_path):
    """The second set moves half the weight; a vertex without weights stays at its node."""
    file = GltfFile()
    low, high = file.root(translation=[0, 0, 0]), file.root(translation=[8, 0, 0])
    third = file.root(translation=[0, 0, 20])
    joints = np.zeros((4, 4), dtype="u1")
    sets = {
        "JOINTS_0": file.accessor(joints, "u1"),
        "WEIGHTS_0": [[1, 0, 0, 0], [0.5, 0, 0, 0], [0, 0, 0, 0], [0.25, 0, 0, 0]],
        "JOINTS_1": file.accessor(joints + np.array([1, 2, 0, 0]), "u2"),
        "WEIGHTS_1": [[0, 0, 0, 0], [0.5, 0, 0, 0], [0, 0, 0, 0], [0.25, 0.5, 0, 0]],
    }
    mesh = file.mesh(file.primitive(attributes=sets))
    skin = file.add("skins", joints=[low, high, third])
    file.root(mesh=mesh, skin=skin, translation=[0, 100, 0])
    result, report = file.load(tmp_path)
    # TETRA[2] has no weights, so the node moves it.
    expected = np.add(TETRA, [[0, 0, 0], [4, 0, 0], [0, 100, 0], [2, 0, 10]])
    assert_same_triangles(result, expected)
    assert report.warnings == ()


def test_a_skin_that_cannot_be_read_leaves_the_mesh_at_its_node(tmp_path):
    file = GltfFile()
    bone = file.root()
    weights = {"JOINTS_0": file.accessor(np.zeros((4, 4)), "u1"), "WEIGHTS_0": np.eye(4)[[0] * 4]}
    mesh = file.mesh(file.primitive(attributes=weights))
    bad_matrix = file.accessor(np.zeros((1, 3)))
    for skin in (
        file.add("skins", joints=[99]),
        file.add("skins", joints=[]),
        file.add("skins", joints=[bone], inverseBindMatrices=bad_matrix),
        17,
    ):
        file.root(mesh=mesh, skin=skin, translation=[0, 0, 5])
    result, report = file.load(tmp_path)
    assert box_of(result) == [[0, 0, 5], [1, 2, 8]]
    assert volume(result) == pytest.approx(4)
    assert codes(report) == {"skin_unreadable": 4}


def test_instances_of_a_skinned_mesh_are_a_warning(tmp_path):
    file = GltfFile()
    bone = file.root(translation=[0, 0, 1])
    weights = {"JOINTS_0": file.accessor(np.zeros((4, 4)), "u1"), "WEIGHTS_0": np.eye(4)[[0] * 4]}
    node = instanced(file, file.primitive(attributes=weights), TRANSLATION=[[0, 0, 0], [9, 0, 0]])
    file.root(**node, skin=file.add("skins", joints=[bone]))
    mesh, report = file.load(tmp_path)
    assert box_of(mesh) == [[0, 0, 1], [1, 2, 4]]
    assert codes(report) == {"invalid_value": 1}


def test_joints_that_mirror_turn_the_faces(tmp_path):
    file = GltfFile()
    bone = file.root(scale=[-1, 1, 1])
    weights = {"JOINTS_0": file.accessor(np.zeros((4, 4)), "u1"), "WEIGHTS_0": np.eye(4)[[0] * 4]}
    skin = file.add("skins", joints=[bone])
    file.draw(file.primitive(attributes=weights), skin=skin)
    mesh, _ = file.load(tmp_path)
    assert box_of(mesh) == [[-1, 0, 0], [0, 2, 3]]
    assert volume(mesh) == pytest.approx(1)


def test_joints_outside_the_scene_still_move_the_mesh(tmp_path):
    file = GltfFile()
    bone = file.add("nodes", translation=[0, 0, 1])
    file.add("nodes", children=[bone], translation=[0, 0, 10])
    weights = {"JOINTS_0": file.accessor(np.zeros((4, 4)), "u1"), "WEIGHTS_0": np.eye(4)[[0] * 4]}
    file.draw(file.primitive(attributes=weights), skin=file.add("skins", joints=[bone]))
    mesh, report = file.load(tmp_path)
    assert box_of(mesh) == [[0, 0, 11], [1, 2, 14]]
    assert report.warnings == ()


# The container


@pytest.mark.parametrize("version", [1, 3])
def test_another_version_is_rejected_by_its_name(tmp_path, version):
    content = bytearray(GltfFile().glb())
    content[4] = version
    with pytest.raises(Reject) as caught:
        load_with_report(write(tmp_path / "a.glb", bytes(content)), CFG)
    assert caught.value.reason == {1: "gltf_1", 3: "unreadable"}[version]


@pytest.mark.parametrize(
    "document",
    [
        '{"asset": {"version": "1.0"}, "meshes": {}}',
        '{"asset": {"version": "1.1", "profile": {"api": "WebGL"}}}',
        '{"meshes": {"geometry1": {"primitives": []}}, "techniques": {}}',
    ],
)
def test_gltf_1_is_rejected_by_that_name(tmp_path, document):
    with pytest.raises(Reject) as caught:
        load_with_report(write(tmp_path / "a.gltf", document), CFG)
    assert caught.value.reason == "gltf_1"


def test_data_after_the_end_of_a_glb_is_a_warning(tmp_path):
    file = GltfFile()
    file.draw(file.primitive())
    mesh, report = load_with_report(write(tmp_path / "a.glb", file.glb() + b"signature"), CFG)
    assert_same_triangles(mesh)
    assert codes(report) == {"trailing_data": 1}


def test_unknown_chunks_of_a_glb_are_a_warning(tmp_path):
    file = GltfFile()
    file.draw(file.primitive())
    content = file.glb() + b"\4\0\0\0NEW\0data"
    content = content[:8] + len(content).to_bytes(4, "little") + content[12:]
    mesh, report = load_with_report(write(tmp_path / "a.glb", content), CFG)
    assert_same_triangles(mesh)
    assert codes(report) == {"unknown_element": 1}


@pytest.mark.parametrize("length", [0, 20, 100_000])
def test_a_wrong_length_in_the_header_of_a_glb_is_a_warning(tmp_path, length):
    file = GltfFile()
    file.draw(file.primitive())
    content = file.glb()
    content = content[:8] + length.to_bytes(4, "little") + content[12:]
    mesh, report = load_with_report(write(tmp_path / "a.glb", content), CFG)
    assert_same_triangles(mesh)
    assert codes(report) == {"count_mismatch": 1}


def test_a_short_side_file_costs_what_it_does_not_hold(tmp_path):
    file = GltfFile()
    file.draw(file.primitive(), file.primitive(TETRA + 5))
    file.document["buffers"] = [{"byteLength": len(file.data), "uri": "a.bin"}]
    write(tmp_path / "a.bin", file.data[:-20])
    mesh, report = load_with_report(write(tmp_path / "a.glb", glb(file.document, b"")), CFG)
    assert_same_triangles(mesh)
    assert codes(report) == {"truncated_data": 1, "primitive_unreadable": 1}


def test_a_missing_side_file_costs_what_needs_it(tmp_path):
    file = GltfFile()
    file.draw(file.primitive())
    file.document["buffers"] = [{"byteLength": len(file.data)}, {"byteLength": 9, "uri": "b.bin"}]
    lost = {"bufferView": file.add("bufferViews", buffer=1, byteLength=9)}
    position = file.accessor(TETRA, **lost)
    file.draw(file.primitive(None, None, {"POSITION": position}))
    file.document["buffers"][0]["byteLength"] = len(file.data)
    mesh, report = file.load(tmp_path)
    assert_same_triangles(mesh)
    assert codes(report) == {"side_file_missing": 1, "primitive_unreadable": 1}


def test_a_document_with_a_byte_order_mark_or_another_encoding_is_read(tmp_path):
    file = GltfFile()
    file.draw(file.primitive(), name="Ä")
    text = file.text().replace("\\u00c4", "Ä")
    mesh, report = load_with_report(
        write(tmp_path / "a.gltf", b"\xef\xbb\xbf" + text.encode()), CFG
    )
    assert_same_triangles(mesh)
    assert report.warnings == ()
    mesh, report = load_with_report(write(tmp_path / "b.gltf", text.encode("latin-1")), CFG)
    assert_same_triangles(mesh)
    assert codes(report) == {"text_encoding": 1}


@pytest.mark.parametrize("value", [np.nan, -0.5, 200.0])
def test_colours_outside_of_their_range_are_reported(tmp_path, value):
    file = GltfFile()
    colors = np.full((8, 3), 0.5)
    colors[3] = value
    file.draw(file.primitive(BOX, BOX_FACES, {"COLOR_0": colors}))
    mesh, report = file.load(tmp_path)
    assert codes(report) == {"invalid_value": 1}
    assert area(mesh) == pytest.approx(6)


def test_weights_that_are_not_finite_or_have_no_joints_are_reported(tmp_path):
    file = GltfFile(skins=[{"joints": [0]}])
    weights = np.tile([1.0, 0, 0, 0], (8, 1))
    weights[2, 0] = np.nan
    attributes = {
        "JOINTS_0": file.accessor(np.zeros((8, 4)), "u1"),
        "WEIGHTS_0": weights,
        "WEIGHTS_1": np.ones((8, 4)),
    }
    file.draw(file.primitive(BOX, BOX_FACES, attributes), skin=0)
    assert codes(file.load(tmp_path)[1]) == {"attribute_mismatch": 1, "invalid_value": 1}
