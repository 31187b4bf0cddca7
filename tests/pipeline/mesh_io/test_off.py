"""OFF files: all header words, text and binary, rows that span lines, counts that are wrong."""

import struct

import numpy as np
import pytest

from tests.pipeline.mesh_io import measures
from tests.pipeline.mesh_io.measures import BOX, QUADS, area, assert_box, read, rejected, volume

COLORS = [(10 * k, 20 * k, 255 - k) for k in range(8)]


def off(
    header="OFF", vertex_values=None, face_values=None, counts=None, vertices=BOX, faces=QUADS
) -> str:
    """Return an OFF text with values after each vertex and each face."""
    lines = [f"{header}", counts or f"{len(vertices)} {len(faces)} 12"]
    for k, vertex in enumerate(np.asarray(vertices).tolist()):
        lines.append(" ".join(map(str, [*vertex, *(vertex_values[k] if vertex_values else ())])))
    for k, face in enumerate(faces):
        extra = face_values[k] if face_values else ()
        lines.append(" ".join(map(str, [len(face), *face, *extra])))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        off(),
        off().replace("OFF\n", "OFF"),  # ModelNet
        off().replace("OFF\n", "OFF "),
        off().replace("OFF\n", ""),  # the word is optional
        off(header="off"),
        off(header="# made by hand\nOFF # words\n# 1 2 3\n\n"),
        off().replace("\n", "\r\n"),
        off().replace("\n", "\r"),
        "\ufeff" + off(),
        off().replace(" ", "\t"),
        off().replace("\n", "\n\n  "),
        off().replace("8 6 12", "8 6"),
        off().replace("8 6 12", "8\n6\n12"),
        off(header="nOFF\n3"),
        off(header="4OFF", vertices=np.column_stack([BOX * 2, np.full(8, 2.0)])),
        off(header="4nOFF 3", vertices=np.column_stack([BOX * 2, np.full(8, 2.0)])),
        off().replace("4 0 1 3 2", "4 0 1\n3\n2"),  # a face spans lines
        off().replace("\n", " ").replace("OFF ", "OFF\n"),  # everything in one line
        off()[:-1] + " # the last face",
    ],
)
def test_every_spelling_gives_the_box(tmp_path, text):
    mesh, codes = read(tmp_path, "a.off", text)
    assert_box(mesh)
    assert codes == {}


@pytest.mark.parametrize("scale", [1, 255], ids=["integers", "floats"])
@pytest.mark.parametrize("has_alpha", [False, True])
@pytest.mark.parametrize("header", ["COFF", "OFF"])
def test_vertex_colours(tmp_path, header, has_alpha, scale):
    values = [(*color, 255)[: 3 + has_alpha] for color in COLORS]
    if scale == 255:
        values = [tuple(value / 255 for value in color) for color in values]
    mesh, codes = read(tmp_path, "a.off", off(header, values))
    assert_box(mesh)
    assert codes == {}
    for point, color in zip(BOX, COLORS, strict=True):
        assert measures.colors_at(mesh, point) == {(*color, 255)}


def test_translucent_vertex_colours_are_blended(tmp_path):
    mesh, _ = read(tmp_path, "a.off", off("COFF", [(*color, 128) for color in COLORS]))
    assert mesh.parts[0].material.alpha_mode == "BLEND"
    assert measures.colors_at(mesh, BOX[2]) == {(20, 40, 253, 128)}


def test_colours_that_all_have_alpha_0_are_opaque(tmp_path):
    mesh, codes = read(tmp_path, "a.off", off("COFF", [(*color, 0) for color in COLORS]))
    assert measures.colors_at(mesh, BOX[2]) == {(20, 40, 253, 255)}
    assert codes == {"invalid_value": 1}


def test_normals_colours_and_texture_coordinates_in_the_order_of_geomview(tmp_path):
    normals = BOX - BOX.mean(axis=0)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    values = [(*normals[k].tolist(), *COLORS[k], 255, 0.5, 0.5) for k in range(8)]
    mesh, codes = read(tmp_path, "a.off", off("STCNOFF", values))
    assert_box(mesh)
    assert codes == {}
    assert measures.colors_at(mesh, BOX[3]) == {(30, 60, 252, 255)}
    expected = mesh.vertices - BOX.mean(axis=0)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(mesh.parts[0].normals, expected, atol=1e-6)
    mesh, _ = read(tmp_path, "b.off", off("NOFF", [value[:3] for value in values]))
    np.testing.assert_allclose(mesh.parts[0].normals, expected, atol=1e-6)


@pytest.mark.parametrize("scale", [1, 255], ids=["integers", "floats"])
@pytest.mark.parametrize("has_alpha", [False, True])
def test_face_colours(tmp_path, has_alpha, scale):
    values = [(*color, 255)[: 3 + has_alpha] for color in COLORS[:6]]
    if scale == 255:
        values = [tuple(value / 255 for value in color) for color in values]
    mesh, codes = read(tmp_path, "a.off", off(face_values=values))
    assert_box(mesh)
    assert codes == {}
    colors = mesh.parts[0].colors[mesh.faces]
    for k, pair in enumerate(colors.reshape(6, 6, 4)):  # two triangles for each quad
        assert (pair == [*COLORS[k], 255]).all()


def test_face_colours_of_some_faces_and_an_index_of_a_colour_map(tmp_path):
    values = [(255, 0, 0), (), (3,), (), (0, 0, 255, 255), ()]
    mesh, codes = read(tmp_path, "a.off", off(face_values=values))
    assert_box(mesh)
    assert codes == {"appearance_ignored": 1, "attribute_mismatch": 4}
    colors = mesh.parts[0].colors[mesh.faces].reshape(6, 6, 4)
    assert (colors[0] == [255, 0, 0, 255]).all()
    assert (colors[4] == [0, 0, 255, 255]).all()


def test_a_face_with_colour_that_spans_lines(tmp_path):
    values = [(255, 0, 0)] * 6
    text = off(face_values=values).replace("4 0 1 3 2 255", "4 0 1\n3 2 255")
    mesh, codes = read(tmp_path, "a.off", text)
    assert_box(mesh)
    assert codes == {}
    assert (mesh.parts[0].colors == [255, 0, 0, 255]).all()


def test_a_concave_polygon_keeps_its_notch(tmp_path):
    vertices = [(x, y, 0) for x, y in measures.U_SHAPE]
    mesh, codes = read(tmp_path, "a.off", off(vertices=vertices, faces=[list(range(8))]))
    assert area(mesh) == pytest.approx(measures.U_AREA)
    assert codes == {}


@pytest.mark.parametrize(
    ("counts", "code"),
    [
        ("8 5 0", "count_mismatch"),
        ("7 6 0", "count_mismatch"),
        ("10 6 0", "count_mismatch"),
        ("8 9 0", "truncated_data"),
        ("8 0 0", "count_mismatch"),
    ],
)
def test_wrong_counts(tmp_path, counts, code):
    mesh, codes = read(tmp_path, "a.off", off(counts=counts))
    assert_box(mesh)
    assert codes == {code: 1}


def test_data_that_ends_early_is_read_up_to_there(tmp_path):
    mesh, codes = read(tmp_path, "a.off", off()[:-6])
    assert len(mesh.faces) == 10
    assert codes == {"truncated_data": 1}
    assert rejected(tmp_path, "a.off", off()[: off().index("4 0 1")]) == "unreadable"


def test_words_after_the_last_face_are_trailing_data(tmp_path):
    mesh, codes = read(tmp_path, "a.off", off() + "the end\n")
    assert_box(mesh)
    assert codes == {"trailing_data": 1, "invalid_value": 2}


def test_unknown_values_of_vertices_and_faces_give_a_code(tmp_path):
    mesh, codes = read(tmp_path, "a.off", off(vertex_values=[(1, 2)] * 8))
    assert_box(mesh)
    assert codes == {"unknown_attribute": 1}
    mesh, codes = read(tmp_path, "a.off", off(face_values=[()] * 5 + [(1, 2)]))
    assert codes.keys() & {"unknown_attribute", "trailing_data"}
    assert rejected(tmp_path, "a.off", off(header="XOFF")) == "unreadable"
    assert rejected(tmp_path, "a.off", off(header="nOFF\n5")) == "unreadable"


def test_points_and_lines_are_left_out_with_a_warning(tmp_path):
    mesh, codes = read(tmp_path, "a.off", off(faces=[*QUADS, [1], [2, 3], [4, 5]]))
    assert_box(mesh)
    assert codes == {"points_left_out": 1, "lines_left_out": 2}
    assert rejected(tmp_path, "a.off", off(faces=[])) == "points_only"


@pytest.mark.parametrize("index", ["8", "-1", "1e30", "0.5", "nan", "x"])
def test_a_face_with_an_index_that_does_not_exist_costs_itself(tmp_path, index):
    mesh, codes = read(tmp_path, "a.off", off().replace("4 0 1 3 2", f"4 0 1 3 {index}"))
    assert len(mesh.faces) == 10
    assert codes.pop("index_out_of_range") == 1
    assert codes in ({}, {"invalid_value": 1})


def binary_off(header=b"OFF", colors=(), face_colors=()) -> bytes:
    data = header + b" BINARY\n" + struct.pack(">3i", 8, 6, 12)
    for k, vertex in enumerate(BOX):
        data += struct.pack(">3f", *vertex)
        if colors:
            data += struct.pack(">4f", *(value / 255 for value in colors[k]), 1)
    for k, face in enumerate(QUADS):
        color = face_colors[k] if face_colors else ()
        data += struct.pack(f">{len(face) + 2}i", len(face), *face, len(color))
        data += struct.pack(f">{len(color)}f", *(value / 255 for value in color))
    return data


def test_the_binary_form(tmp_path):
    mesh, codes = read(tmp_path, "a.off", binary_off())
    assert_box(mesh)
    assert codes == {}
    mesh, codes = read(tmp_path, "b.off", binary_off(b"COFF", COLORS))
    assert_box(mesh)
    assert measures.colors_at(mesh, BOX[5]) == {(*COLORS[5], 255)}
    face_colors = [(255, 0, 0)] * 5 + [(0, 255, 0, 255)]
    mesh, codes = read(tmp_path, "c.off", binary_off(face_colors=face_colors))
    assert_box(mesh)
    assert (mesh.parts[0].colors[mesh.faces[:10]] == [255, 0, 0, 255]).all()
    assert (mesh.parts[0].colors[mesh.faces[10:]] == [0, 255, 0, 255]).all()


@pytest.mark.parametrize(
    ("content", "faces", "code"),
    [(binary_off() + b"abc", 12, "trailing_data"), (binary_off()[:-3], 10, "truncated_data")],
    ids=["longer", "shorter"],
)
def test_binary_data_of_another_length_than_declared(tmp_path, content, faces, code):
    mesh, codes = read(tmp_path, "a.off", content)
    assert (len(mesh.faces), codes) == (faces, {code: 1})


def test_counts_beyond_the_limits_are_rejected(tmp_path):
    assert rejected(tmp_path, "a.off", off(counts="8 400000000 0")) == "allocation_bomb"
    assert rejected(tmp_path, "a.off", off(counts="400000000 6 0")) == "allocation_bomb"
    assert rejected(tmp_path, "a.off", off(counts="-8 6 0")) == "unreadable"
    assert rejected(tmp_path, "a.off", off(), max_faces=5) == "too_many_faces"
    assert rejected(tmp_path, "a.off", off(counts="8 1 0"), max_faces=11) == "too_many_faces"
    claim = b"OFF BINARY\n" + struct.pack(">3i", 8, 2**31 - 1, 0)
    assert rejected(tmp_path, "a.off", claim) == "allocation_bomb"


@pytest.mark.parametrize("seed", range(5))
def test_meshes_of_another_writer(tmp_path, seed):
    source = measures.bumpy_sphere(seed)
    mesh, codes = read(tmp_path, "a.off", source.export(file_type="off", digits=12))
    assert codes == {}
    assert len(mesh.faces) == len(source.faces)
    np.testing.assert_allclose((area(mesh), volume(mesh)), (source.area, source.volume))
    np.testing.assert_allclose(mesh.vertices.min(axis=0), source.bounds[0])


@pytest.mark.parametrize("content", [off("COFF", COLORS).encode(), off().encode(), binary_off()])
def test_damaged_files_are_loaded_or_rejected(tmp_path, content):
    measures.assert_fuzzed_files_are_safe(tmp_path, "a.off", content, rounds=200)
