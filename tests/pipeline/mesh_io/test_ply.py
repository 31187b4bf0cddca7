"""PLY files: text and both byte orders, mixed polygons, strips, colours, textures, wrong counts."""

import struct

import numpy as np
import pytest

from tests.pipeline.mesh_files import png
from tests.pipeline.mesh_io import measures
from tests.pipeline.mesh_io.measures import BOX, QUADS, area, assert_box, read, rejected, volume

MIXED = [QUADS[0][:3], [0, 3, 2], *QUADS[1:]]  # two triangles and five quads
COLORS = [(10 * k, 20 * k, 255 - k) for k in range(8)]
CODES = {"char": "b", "uchar": "B", "short": "h", "ushort": "H", "int": "i", "uint": "I"}
CODES |= {"float": "f", "double": "d"}
FORMATS = ["ascii", "binary_little_endian", "binary_big_endian"]
XYZ = ["float x", "float y", "float z"]
INDICES = ["list uchar int vertex_indices"]


def ply(elements, kind="ascii", comments=(), counts=None) -> bytes:
    """Return a PLY file.

    Args:
        elements: {name: (properties as in the header, rows)}. A list is a sequence in the row.
        kind: The format.
        comments: Lines of the header.
        counts: {name: declared count}, if it is not the number of rows.
    """
    lines = ["ply", f"format {kind} 1.0", *comments]
    for name, (properties, rows) in elements.items():
        lines.append(f"element {name} {(counts or {}).get(name, len(rows))}")
        lines += [f"property {item}" for item in properties]
    header = "\n".join([*lines, "end_header", ""]).encode()
    body = b""
    order = "<" if "little" in kind else ">"
    for properties, rows in elements.values():
        for row in rows:
            for item, value in zip(properties, row, strict=True):
                types = item.split()[:-1]
                if types[0] == "list":
                    values, code = (
                        [len(value), *value],
                        CODES[types[1]] + len(value) * CODES[types[2]],
                    )
                else:
                    values, code = [value], CODES[types[0]]
                if kind == "ascii":
                    body += " ".join(map(str, values)).encode() + b" "
                else:
                    body += struct.pack(order + code, *values)
            body += b"\n" if kind == "ascii" else b""
    return header + body


def box(kind="ascii", faces=QUADS, vertex=(), face=(), extra=None, **options) -> bytes:
    """Return the box. `vertex` and `face` are (property, values) that are added to the rows."""
    rows = [[*point, *(values[k] for _, values in vertex)] for k, point in enumerate(BOX.tolist())]
    face_rows = [[list(f), *(values[k] for _, values in face)] for k, f in enumerate(faces)]
    elements = {
        "vertex": ([*XYZ, *(name for name, _ in vertex)], rows),
        "face": ([*INDICES, *(name for name, _ in face)], face_rows),
        **(extra or {}),
    }
    return ply(elements, kind, **options)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("faces", [QUADS, MIXED], ids=["quads", "mixed"])
def test_polygons_in_every_format(tmp_path, kind, faces):
    mesh, codes = read(tmp_path, "a.ply", box(kind, faces))
    assert_box(mesh)
    assert codes == {}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("number", ["char", "short", "int", "uint", "float", "double"])
@pytest.mark.parametrize("length", ["char", "uchar", "short", "ushort", "int", "uint"])
def test_every_type_of_coordinates_lengths_and_indices(tmp_path, kind, number, length):
    index = "int" if number in ("float", "double") else number
    content = ply(
        {
            "vertex": ([f"{number} {axis}" for axis in "xyz"], BOX.astype(int).tolist()),
            "face": ([f"list {length} {index} vertex_index"], [[f] for f in MIXED]),
        },
        kind,
    )
    mesh, codes = read(tmp_path, "a.ply", content)
    assert_box(mesh)
    assert codes == {}


@pytest.mark.parametrize("line_end", [b"\r", b"\r\n"])
@pytest.mark.parametrize("kind", FORMATS)
def test_line_ends_of_old_systems(tmp_path, kind, line_end):
    content = box(kind)
    end = content.index(b"end_header\n") + len(b"end_header\n")
    header, body = content[:end].replace(b"\n", line_end), content[end:]
    if kind == "ascii":
        body = body.replace(b"\n", line_end)
    mesh, codes = read(tmp_path, "a.ply", header + body)
    assert_box(mesh)
    assert codes == {}


def test_rows_that_span_lines_comments_and_a_byte_order_mark(tmp_path):
    content = box(comments=["comment by hand: element face 3", "obj_info num_cols 512"])
    for text in (
        content.replace(b"4 0 1 3 2", b"4 0 1\n3 2"),
        b"\xef\xbb\xbf" + content,
        content.replace(b" ", b"\t"),
        content.replace(b"\n0.0", b"\n\n   0.0"),
    ):
        mesh, codes = read(tmp_path, "a.ply", text)
        assert_box(mesh)
        assert codes == {}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_concave_polygon_keeps_its_notch(tmp_path, kind):
    rows = [[x, y, 0] for x, y in measures.U_SHAPE]
    content = ply({"vertex": (XYZ, rows), "face": (INDICES, [[list(range(8))]])}, kind)
    mesh, _ = read(tmp_path, "a.ply", content)
    assert area(mesh) == pytest.approx(measures.U_AREA)


@pytest.mark.parametrize("kind", FORMATS)
def test_triangle_strips_turn_every_second_triangle(tmp_path, kind):
    # Each side of the box is a strip of four corners; the last two are in a row of their own.
    strips = [[a, b, d, c] for a, b, c, d in QUADS]
    joined = [index for strip in strips[:4] for index in (*strip, -1)]
    rows = [[joined], [[*strips[4], -1, *strips[5]]]]
    content = ply(
        {"vertex": (XYZ, BOX), "tristrips": (["list int int vertex_indices"], rows)}, kind
    )
    mesh, codes = read(tmp_path, "a.ply", content)
    assert_box(mesh)
    assert codes == {}


COLOR_TYPES = {"uchar": 1, "ushort": 257, "uint": 2**32 // 255, "float": 1 / 255, "double": 1 / 255}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("number", COLOR_TYPES)
@pytest.mark.parametrize(
    "names", ["red green blue", "r g b", "diffuse_red diffuse_green diffuse_blue"]
)
def test_colours_of_vertices_and_faces_of_every_type(tmp_path, kind, number, names):
    scale = COLOR_TYPES[number]
    columns = [
        (f"{number} {name}", [color[k] * scale for color in COLORS])
        for k, name in enumerate(names.split())
    ]
    # The largest value tells the range, so one channel has it.
    mesh, codes = read(tmp_path, "a.ply", box(kind, vertex=columns))
    assert_box(mesh)
    assert codes == {}
    for point, color in zip(BOX, COLORS, strict=True):
        assert measures.colors_at(mesh, point) == {(*color, 255)}
    mesh, codes = read(tmp_path, "b.ply", box(kind, face=[(n, v[:6]) for n, v in columns]))
    assert codes == {}
    colors = mesh.parts[0].colors[mesh.faces].reshape(6, 6, 4)
    for k in range(6):
        assert (colors[k] == [*COLORS[k], 255]).all()


def test_alpha_of_vertices_is_blended(tmp_path):
    columns = [
        (f"uchar {n}", [c[k] for c in COLORS]) for k, n in enumerate(("red", "green", "blue"))
    ]
    columns.append(("uchar alpha", [100] * 8))
    mesh, codes = read(tmp_path, "a.ply", box(vertex=columns))
    assert mesh.parts[0].material.alpha_mode == "BLEND"
    assert measures.colors_at(mesh, BOX[3]) == {(30, 60, 252, 100)}
    columns[-1] = ("uchar alpha", [0] * 8)
    mesh, codes = read(tmp_path, "a.ply", box(vertex=columns))
    assert measures.colors_at(mesh, BOX[3]) == {(30, 60, 252, 255)}
    assert codes == {"invalid_value": 1}


def test_normals_are_read(tmp_path):
    columns = [(f"float n{axis}", [float(axis == "y")] * 8) for axis in "xyz"]
    mesh, codes = read(tmp_path, "a.ply", box(vertex=columns))
    assert (mesh.parts[0].normals == [0, 1, 0]).all()
    assert codes == {}


TEXTURES = ["comment TextureFile a one.png", "comment TextureFile b.png"]


def write_textures(folder) -> None:
    (folder / "a one.png").write_bytes(png((200, 10, 10, 255)))
    (folder / "b.png").write_bytes(png((10, 10, 200, 255)))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("names", ["s t", "u v", "texture_u texture_v"])
def test_texture_coordinates_of_vertices(tmp_path, kind, names):
    write_textures(tmp_path)
    u, v = names.split()
    columns = [(f"float {u}", BOX[:, 0].tolist()), (f"float {v}", (BOX[:, 1] / 4).tolist())]
    content = box(kind, vertex=columns, comments=TEXTURES[:1])
    mesh, codes = read(tmp_path, "a.ply", content)
    assert_box(mesh)
    assert codes == {}
    (part,) = mesh.parts
    assert (part.material.texture == [200, 10, 10, 255]).all()
    np.testing.assert_allclose(part.uv, mesh.vertices[:, :2] * [1, 0.25])


@pytest.mark.parametrize("kind", FORMATS)
def test_texture_coordinates_and_textures_of_faces(tmp_path, kind):
    write_textures(tmp_path)
    coordinates = [[0.0, 0.0, 0.25, 0.0, 0.25, 0.5, 0.0, 0.5]] * 6
    face = [("list uchar float texcoord", coordinates), ("int texnumber", [0, 1, 1, 1, 1, 1])]
    mesh, codes = read(tmp_path, "a.ply", box(kind, face=face, comments=TEXTURES))
    assert_box(mesh)
    assert codes == {}
    first, second = mesh.parts
    assert (first.material.texture[..., 0] == 200).all()
    assert (second.material.texture[..., 2] == 200).all()
    assert len(mesh.faces[first.faces]) == 2
    uv_area = 0.0
    for part in mesh.parts:
        a, b, c = np.moveaxis(part.uv[mesh.faces[part.faces] - part.vertices.start], 1, 0)
        (u1, v1), (u2, v2) = (b - a).T, (c - a).T
        uv_area += (u1 * v2 - u2 * v1).sum() / 2
    assert uv_area == pytest.approx(6 * 0.125)


def test_faces_without_texture_coordinates_are_not_textured(tmp_path):
    write_textures(tmp_path)
    coordinates = [[0.0, 0.0, 0.25, 0.0, 0.25, 0.5, 0.0, 0.5]] * 4 + [[], [0.0, 0.0]]
    face = [("list uchar float texcoord", coordinates)]
    mesh, codes = read(tmp_path, "a.ply", box(face=face, comments=TEXTURES))
    assert_box(mesh)
    assert codes == {"attribute_mismatch": 1}
    assert sorted(part.material.texture is None for part in mesh.parts) == [False, True]


def test_a_missing_texture_costs_itself(tmp_path):
    columns = [("float s", [0.0] * 8), ("float t", [0.0] * 8)]
    mesh, codes = read(tmp_path, "a.ply", box(vertex=columns, comments=TEXTURES[:1]))
    assert_box(mesh)
    assert codes == {"side_file_missing": 1}
    mesh, codes = read(tmp_path, "a.ply", box(comments=TEXTURES[:1]))
    assert codes == {"texture_without_uv": 1}


def test_colours_beside_a_texture_are_left_out_with_a_warning(tmp_path):
    write_textures(tmp_path)
    columns = [("float s", [0.0] * 8), ("float t", [0.0] * 8)]
    columns += [(f"uchar {name}", [9] * 8) for name in ("red", "green", "blue")]
    mesh, codes = read(tmp_path, "a.ply", box(vertex=columns, comments=TEXTURES[:1]))
    assert mesh.parts[0].colors is None
    assert codes == {"appearance_ignored": 1}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("counts", "code"),
    [
        ({"face": 5}, "count_mismatch"),
        ({"face": 0}, "count_mismatch"),
        ({"vertex": 7}, "count_mismatch"),
        ({"vertex": 11}, "count_mismatch"),
        ({"face": 8}, "truncated_data"),
    ],
)
def test_wrong_counts(tmp_path, kind, counts, code):
    mesh, codes = read(tmp_path, "a.ply", box(kind, counts=counts))
    assert_box(mesh)
    assert codes == {code: 1}


@pytest.mark.parametrize("kind", FORMATS)
def test_data_that_ends_early_is_read_up_to_there(tmp_path, kind):
    mesh, codes = read(tmp_path, "a.ply", box(kind)[:-3])
    assert len(mesh.faces) == 10
    assert codes == {"truncated_data": 1}
    cut = box(kind)[: box(kind).index(b"end_header\n") + 40]
    assert rejected(tmp_path, "a.ply", cut) == "unreadable"


def test_lines_with_more_numbers_than_declared_are_read_up_to_there(tmp_path):
    """MeshLab writes a list of colours by corner where its header declares one colour."""
    lines = box(face=[("uchar red", [1] * 6)]).decode().splitlines(keepends=True)
    rows = [k for k, line in enumerate(lines) if line.startswith("4 ") and line.endswith(" 1 \n")]
    assert len(rows) == 6
    for k in rows:
        lines[k] = lines[k].removesuffix("1 \n") + "9 1 1 1 1 1 1 1 1 1 \n"
    mesh, codes = read(tmp_path, "a.ply", "".join(lines).encode())
    assert_box(mesh)
    assert codes["trailing_data"] == 6


@pytest.mark.parametrize("kind", FORMATS)
def test_data_after_the_last_row_is_trailing_data(tmp_path, kind):
    trailer = b"9 9\n" if kind == "ascii" else b"\7\7\7"
    mesh, codes = read(tmp_path, "a.ply", box(kind) + trailer)
    assert_box(mesh)
    assert codes == {"trailing_data": 1}


@pytest.mark.parametrize("kind", FORMATS)
def test_unknown_elements_properties_and_header_words_give_codes(tmp_path, kind):
    unknown = {"wheel": (["float radius", "list uchar int spokes"], [[1.0, [1, 2]], [2.0, []]])}
    mesh, codes = read(tmp_path, "a.ply", box(kind, extra=unknown))
    assert_box(mesh)
    assert codes == {"unknown_element": 1}
    mesh, codes = read(tmp_path, "a.ply", box(kind, comments=["colour space sRGB"]))
    assert_box(mesh)
    assert codes == {"unknown_element": 1}
    mesh, codes = read(tmp_path, "a.ply", box(kind, vertex=[("float glow", [1.0] * 8)]))
    assert_box(mesh)
    assert codes == {"unknown_attribute": 1}
    face = [("list uchar float glow", [[1.0], [], [1.0, 2.0], [], [], []])]
    mesh, codes = read(tmp_path, "a.ply", box(kind, face=face))
    assert_box(mesh)
    assert codes == {"unknown_attribute": 1}
    mesh, codes = read(tmp_path, "a.ply", box(kind, vertex=[("float quality", [1.0] * 8)]))
    assert codes == {}


@pytest.mark.parametrize("kind", FORMATS)
def test_edges_and_points_are_left_out(tmp_path, kind):
    edges = {"edge": (["int vertex1", "int vertex2"], [[0, 1], [1, 2]])}
    mesh, codes = read(tmp_path, "a.ply", box(kind, extra=edges))
    assert_box(mesh)
    assert codes == {"lines_left_out": 2}
    assert rejected(tmp_path, "a.ply", ply({"vertex": (XYZ, BOX)}, kind)) == "points_only"
    assert rejected(tmp_path, "a.ply", box(kind, faces=[])) == "points_only"
    assert rejected(tmp_path, "a.ply", ply({"vertex": (XYZ, [])}, kind)) == "empty_scene"


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("index", [8, -1, 2**31 - 1])
def test_a_face_with_an_index_that_does_not_exist_costs_itself(tmp_path, kind, index):
    mesh, codes = read(tmp_path, "a.ply", box(kind, [[0, 1, 3, index], *QUADS[1:]]))
    assert len(mesh.faces) == 10
    assert codes == {"index_out_of_range": 1}


def test_counts_beyond_the_limits_are_rejected(tmp_path):
    for kind in FORMATS:
        for name in ("vertex", "face"):
            content = box(kind, counts={name: 400_000_000})
            assert rejected(tmp_path, "a.ply", content) == "allocation_bomb"
            content = box(kind, counts={name: -1})
            assert rejected(tmp_path, "a.ply", content) == "unreadable"
        assert rejected(tmp_path, "a.ply", box(kind), max_faces=5) == "too_many_faces"
        content = box(kind, counts={"face": 1})
        assert rejected(tmp_path, "a.ply", content, max_faces=11) == "too_many_faces"
    content = box(extra={"nothing": ([], [])}, counts={"nothing": 10**12})
    assert_box(read(tmp_path, "a.ply", content)[0])


@pytest.mark.parametrize("encoding", ["ascii", "binary"])
@pytest.mark.parametrize("seed", range(4))
def test_meshes_of_another_writer(tmp_path, encoding, seed):
    source = measures.bumpy_sphere(seed)
    shape = (len(source.vertices), 4)
    colors = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    source.visual.vertex_colors = colors
    content = source.export(file_type="ply", encoding=encoding)
    mesh, codes = read(tmp_path, "a.ply", content)
    assert codes == {}
    assert volume(mesh) == pytest.approx(source.volume, rel=1e-5)
    np.testing.assert_allclose(mesh.vertices[mesh.faces], source.triangles, atol=1e-6)
    assert (mesh.parts[0].colors == colors).all()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("faces", [QUADS, MIXED], ids=["quads", "mixed"])
def test_damaged_files_are_loaded_or_rejected(tmp_path, kind, faces):
    measures.assert_fuzzed_files_are_safe(tmp_path, "a.ply", box(kind, faces), rounds=150)


def test_indices_of_a_text_beyond_their_declared_type_are_those_of_the_text(tmp_path):
    """A fan of 298 triangles with indices up to 299, declared as 8 bits. They wrapped at 256."""
    angles = 2 * np.pi * np.arange(300) / 300
    points = [[np.cos(a), np.sin(a), 0] for a in angles.tolist()]
    faces = [[[0, k, k + 1]] for k in range(1, 299)]
    expected = 150 * np.sin(2 * np.pi / 300)  # 300 triangles from the centre
    for kind in ("uchar", "char"):
        content = ply(
            {"vertex": (XYZ, points), "face": ([f"list uchar {kind} vertex_indices"], faces)}
        )
        mesh, codes = read(tmp_path, "a.ply", content)
        assert codes.keys() == {"invalid_value"}
        np.testing.assert_allclose((len(mesh.faces), area(mesh)), (298, expected))


@pytest.mark.parametrize(
    ("written", "expected"), [(300, 255), (-1, 0), (0.5, 128), (255, 255), (255.0, 255)]
)
def test_colours_of_a_text_beyond_their_declared_type(tmp_path, written, expected):
    """They wrapped at 256, and shares of 1 became 0."""
    rows = [[*point, written, 0, 0] for point in BOX.tolist()]
    properties = [*XYZ, "uchar red", "uchar green", "uchar blue"]
    faces = (INDICES, [[face] for face in QUADS])
    mesh, codes = read(tmp_path, "a.ply", ply({"vertex": (properties, rows), "face": faces}))
    assert codes == ({} if written == 255 else {"invalid_value": 8})
    assert measures.colors_at(mesh, BOX[0]) == {(expected, 0, 0, 255)}


def test_an_index_with_a_fraction_refers_to_no_vertex(tmp_path):
    mesh, codes = read(tmp_path, "a.ply", box(faces=[*QUADS, [0.5, 1, 2]]))
    assert codes == {"invalid_value": 1, "index_out_of_range": 1}
    assert_box(mesh)


def test_another_version_is_reported(tmp_path):
    mesh, codes = read(tmp_path, "a.ply", box().replace(b"ascii 1.0", b"ascii 2.0"))
    assert codes == {"invalid_value": 1}
    assert_box(mesh)
