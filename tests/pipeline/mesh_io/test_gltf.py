"""glTF files, each feature against numbers computed by hand."""

import json

import numpy as np
import pytest

from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.load import load
from tests.pipeline.mesh_files import TETRA, assert_same_triangles, glb, gltf, png, write

CFG = LoadConfig()
HALF_TURN_Z = [0, 0, 1, 0]  # a rotation by 180 degrees about z, as x y z w


def with_array(
    document: dict, data: bytes, name: str, array: np.ndarray, kind: str, component: int, **fields
) -> bytes:
    """Return the data with one more array appended.

    It becomes an attribute of the first primitive unless its name is lower case.
    """
    document["bufferViews"].append(
        {"buffer": 0, "byteOffset": len(data), "byteLength": array.nbytes}
    )
    accessor = {
        "bufferView": len(document["bufferViews"]) - 1,
        "componentType": component,
        "count": len(array),
    }
    document["accessors"].append(accessor | {"type": kind} | fields)
    if name[0].isupper():
        document["meshes"][0]["primitives"][0]["attributes"][name] = len(document["accessors"]) - 1
    data += array.tobytes() + b"\0" * (-array.nbytes % 4)
    document["buffers"][0]["byteLength"] = len(data)
    return data


def uv_of_corners(path) -> list[tuple[float, ...]]:
    """Load a tetrahedron and return the texture coordinates of its corners, ordered as TETRA."""
    mesh = load(path, CFG)
    assert_same_triangles(mesh)
    uv = mesh.parts[0].uv.round(4).tolist()
    by_position = {tuple(p): tuple(t) for p, t in zip(mesh.vertices, uv, strict=True)}
    assert len(by_position) == len(TETRA)
    return [by_position[tuple(corner)] for corner in TETRA]


def test_normalised_integers_are_scaled(tmp_path):
    document, data = gltf(image=png())
    document["nodes"] = [{"mesh": 0, "scale": [3, 3, 3]}]
    packed = np.zeros((4, 4), dtype="<i2")  # padded to four bytes a row
    packed[:, :3] = np.rint(TETRA / 3 * 32767)
    view = len(document["bufferViews"])
    data = with_array(document, data, "POSITION", packed, "VEC3", 5122, normalized=True)
    document["bufferViews"][view]["byteStride"] = 8
    stored = np.array([[0, 0], [65535, 0], [0, 65535], [13107, 65535]], dtype="<u2")
    data = with_array(document, data, "TEXCOORD_0", stored, "VEC2", 5123, normalized=True)
    mesh = load(write(tmp_path / "a.glb", glb(document, data)), CFG)
    np.testing.assert_allclose(np.sort(mesh.vertices, axis=0), np.sort(TETRA, axis=0), atol=1e-3)
    found = sorted(map(tuple, mesh.parts[0].uv.tolist()))
    np.testing.assert_allclose(found, [(0.0, 0.0), (0.0, 1.0), (0.2, 0.0), (1.0, 1.0)], atol=1e-4)


def test_the_second_set_of_texture_coordinates_is_used(tmp_path):
    document, data = gltf(image=png())
    second = np.array([[0.5, 0.5], [0.25, 0.5], [0.5, 0.25], [0.75, 1.0]], dtype="<f4")
    data = with_array(document, data, "TEXCOORD_1", second, "VEC2", 5126)
    document["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"]["texCoord"] = 1
    found = uv_of_corners(write(tmp_path / "a.glb", glb(document, data)))
    assert found == [(0.5, 0.5), (0.25, 0.5), (0.5, 0.75), (0.75, 0.0)]


def test_a_texture_transform_is_applied(tmp_path):
    document, data = gltf(image=png())  # u to the right, v down: (0,0) (1,0) (0,1) (1,1)
    transform = {"offset": [0.5, 0.25], "scale": [2, 4], "rotation": np.pi / 2}
    texture = document["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"]
    texture["extensions"] = {"KHR_texture_transform": transform}
    found = uv_of_corners(write(tmp_path / "a.glb", glb(document, data)))
    # By the extension's matrices (u, v) -> (4 v + 0.5, -2 u + 0.25). Ours has v = 0 at the bottom.
    assert found == [(0.5, 0.75), (0.5, 2.75), (4.5, 0.75), (4.5, 2.75)]


def skinned(weights, *, inverse=None, unit_bytes=False) -> tuple[dict, bytes]:
    """A tetrahedron with two joints.

    The first moves by 10 along y. The second rotates by 180 degrees about z and moves by 5 along x.
    """
    nodes = [
        {"mesh": 0, "skin": 0, "translation": [100, 0, 0], "children": [3]},
        {"translation": [0, 10, 0]},
        {"translation": [5, 0, 0], "children": [4]},
        {"mesh": 1},
        {"rotation": HALF_TURN_Z},
    ]
    document, data = gltf(nodes=nodes)
    document["meshes"].append(json.loads(json.dumps(document["meshes"][0])))
    document["scenes"][0]["nodes"] = [0, 1, 2]
    document["skins"] = [{"joints": [1, 4]}]
    data = with_array(
        document, data, "JOINTS_0", np.tile(np.array([[0, 1, 0, 0]], "u1"), (4, 1)), "VEC4", 5121
    )
    stored = np.array(weights, dtype="<f4")
    if unit_bytes:
        data = with_array(
            document,
            data,
            "WEIGHTS_0",
            np.rint(stored * 255).astype("u1"),
            "VEC4",
            5121,
            normalized=True,
        )
    else:
        data = with_array(document, data, "WEIGHTS_0", stored, "VEC4", 5126)
    if inverse is not None:
        data = with_array(document, data, "inverse", np.array(inverse, "<f4"), "MAT4", 5126)
        document["skins"][0]["inverseBindMatrices"] = len(document["accessors"]) - 1
    return document, data


@pytest.mark.parametrize("unit_bytes", [False, True])
def test_a_skinned_mesh_is_posed_by_its_joints(tmp_path, unit_bytes):
    weights = [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    mesh = load(write(tmp_path / "a.glb", glb(*skinned(weights, unit_bytes=unit_bytes))), CFG)
    found = {tuple(p) for p in mesh.vertices.round(5).tolist()}
    plain = {
        (100, 0, 0),
        (101, 0, 0),
        (100, 2, 0),
        (100, 0, 3),
    }  # the other mesh keeps the transform of its node
    # The first joint moves by 10 along y. The second rotates (0, 2, 0) to (0, -2, 0) and moves by
    # 5 along x. A vertex without a joint has the transform of the node.
    assert found == plain | {(0, 10, 0), (1, 10, 0), (5, -2, 0), (100, 0, 3)}
    assert len(mesh.faces) == 8


def test_inverse_bind_matrices_and_blended_weights_are_applied(tmp_path):
    inverse = np.tile(np.eye(4), (2, 1, 1))
    inverse[0, :3, 3] = [0, -10, 0]  # cancels the first joint
    weights = [[0.5, 0.5, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0], [1, 0, 0, 0]]
    columns = inverse.transpose(0, 2, 1).reshape(2, 16)
    mesh = load(write(tmp_path / "a.glb", glb(*skinned(weights, inverse=columns))), CFG)
    found = {tuple(p) for p in mesh.vertices.round(5).tolist()}
    assert found >= {(2.5, 0, 0), (1, 0, 0), (0, 2, 0), (0, 0, 3)}


def test_a_skin_in_a_side_file_is_applied(tmp_path):
    document, data = skinned([[1, 0, 0, 0]] * 4)
    write(tmp_path / "a.bin", data)
    document["buffers"][0]["uri"] = "a.bin"
    mesh = load(write(tmp_path / "a.gltf", json.dumps(document)), CFG)
    np.testing.assert_allclose(mesh.vertices.min(axis=0), [0, 0, 0])
    np.testing.assert_allclose(mesh.vertices.max(axis=0), [101, 12, 3])
