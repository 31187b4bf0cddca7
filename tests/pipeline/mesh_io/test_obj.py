"""OBJ files: the whole grammar, indices of every kind, attributes of some faces, libraries."""

import numpy as np
import pytest
import trimesh

from tests.pipeline.mesh_files import png
from tests.pipeline.mesh_io import measures
from tests.pipeline.mesh_io.measures import BOX, QUADS, area, assert_box, read, rejected, volume

VERTICES = "".join(f"v {x} {y} {z}\n" for x, y, z in BOX)
FACES = "".join("f " + " ".join(str(i + 1) for i in quad) + "\n" for quad in QUADS)
TEXT = VERTICES + FACES
NEGATIVE = VERTICES + "".join("f " + " ".join(str(i - 8) for i in quad) + "\n" for quad in QUADS)
FIRST = "f 1 2 4 3\n"


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT.replace(" ", "\t"),
        TEXT.replace("f ", "  f   ").replace("v ", "\tv "),
        TEXT.replace("\n", "\r\n"),
        TEXT.replace("\n", "\r"),
        TEXT.replace("\n", " # a comment: f 1 2 3\n"),
        TEXT.replace("\n", "\n\n# C:\\models\\\n"),
        TEXT.replace(FIRST, "f 1 2 \\\n4 3\n"),
        TEXT.replace(FIRST, "f 1 2 \\\n  4 \\\n 3\n").replace("\n", "\r\n"),
        TEXT.replace(FIRST, "f 1/ 2/ 4/ 3/\n"),
        TEXT.replace(FIRST, "f 1// 2 4/ 3//\n"),
        TEXT.replace("v ", "V ").replace("f ", "F "),
        TEXT.replace(FIRST, "fo 1 2 4 3\n"),
        TEXT[:-1],
        "\ufeff" + TEXT,
        TEXT.encode("utf-16"),
        FACES + VERTICES,
        NEGATIVE,
        NEGATIVE + "v 9 9 9\n",
        TEXT.replace("f ", "g a\ns 1\no b\nf "),
        TEXT.replace("1.0", "1.0e0"),
        "# \xe9\n" + TEXT,
    ],
)
def test_every_spelling_gives_the_box(tmp_path, text):
    mesh, codes = read(tmp_path, "a.obj", text)
    assert_box(mesh)
    assert codes == {}


def test_negative_indices_in_a_continued_line_count_from_their_own_place(tmp_path):
    text = NEGATIVE.replace("f -8 -7 -5 -6\n", "f -8 \\\n-7 \\\n-5 -6\n")
    more = "".join(f"v {x + 10} {y} {z}\n" for x, y, z in BOX)
    faces = NEGATIVE.removeprefix(VERTICES)
    mesh, codes = read(tmp_path, "a.obj", text + more + faces + "v 50 50 50\n")
    assert volume(mesh) == pytest.approx(12)
    np.testing.assert_allclose(mesh.vertices.max(axis=0), [11, 2, 3])
    assert codes == {}


@pytest.mark.parametrize("index", ["0", "9", "-9", "x", "1e3", "99999999999999999999999"])
def test_a_face_with_an_index_that_does_not_exist_costs_itself(tmp_path, index):
    mesh, codes = read(tmp_path, "a.obj", TEXT.replace(FIRST, f"f 1 2 4 {index}\n"))
    assert len(mesh.faces) == 10
    assert codes.pop("index_out_of_range") == 1
    assert codes in ({}, {"invalid_value": 1})


def test_a_concave_polygon_keeps_its_notch(tmp_path):
    text = "".join(f"v {x} {y} 0\n" for x, y in measures.U_SHAPE) + "f 1 2 3 4 5 6 7 8\n"
    mesh, codes = read(tmp_path, "a.obj", text)
    assert area(mesh) == pytest.approx(measures.U_AREA)
    assert codes == {}


ATTRIBUTES = "vt 0.25 0.5\nvt 1 0 0\nvt 0.5\nvt 0 1\nvn 0 0 1\nvn 0 2 0\n"


def test_mixed_corners_keep_what_each_face_states(tmp_path):
    faces = ["f 1 2 4 3", "f 5/1 7/2 8/3 6/4", "f 1//1 5//1 6//1 2//1", "f 3/1/2 4/1/2 8/4/2 7/4/2"]
    faces += ["f 1/1 3/1 7/1 5/1", "f 2//2 6//2 8//2 4//2"]
    mesh, codes = read(tmp_path, "a.obj", VERTICES + ATTRIBUTES + "\n".join(faces))
    assert_box(mesh)
    assert codes == {}
    kinds = {}
    for part in mesh.parts:
        kinds[part.normals is not None] = kinds.get(part.normals is not None, 0) + (
            part.faces.stop - part.faces.start
        )
    assert kinds == {False: 6, True: 6}


@pytest.mark.parametrize("corner", ["{v}/{t}/{n}", "{v}/{t}", "{v}//{n}"])
def test_attributes_of_corners_are_those_of_the_file(tmp_path, corner):
    (tmp_path / "a.mtl").write_text("newmtl m\nmap_Kd t.png\n", encoding="utf-8")
    (tmp_path / "t.png").write_bytes(png((10, 20, 30, 255)))
    generator = np.random.default_rng(0)
    uv = generator.random((24, 2)).round(3)
    normals = np.eye(3)[generator.integers(0, 3, 24)]
    lines = [f"vt {u} {v}" for u, v in uv] + [f"vn {x} {y} {z}" for x, y, z in normals]
    order = generator.permutation(24).reshape(6, 4)
    for quad, numbers in zip(QUADS, order, strict=True):
        corners = [
            corner.format(v=v + 1, t=k + 1, n=24 - k) for v, k in zip(quad, numbers, strict=True)
        ]
        lines.append("f " + " ".join(corners))
    mesh, codes = read(tmp_path, "a.obj", f"mtllib a.mtl\nusemtl m\n{VERTICES}" + "\n".join(lines))
    assert_box(mesh)
    assert codes == ({} if "{t}" in corner else {"texture_without_uv": 1})
    (part,) = mesh.parts
    expected = np.array([[quad[i] for i in (0, 1, 2, 0, 2, 3)] for quad in QUADS])
    numbers = order[:, [0, 1, 2, 0, 2, 3]]

    def rows(values):  # of (position, value), in the order of a sort
        return np.unique(np.column_stack([BOX[expected.ravel()], values]), axis=0)

    if "{t}" in corner:
        got = np.unique(np.column_stack([mesh.vertices, part.uv]).round(6), axis=0)
        np.testing.assert_allclose(got, rows(uv[numbers.ravel()]), atol=1e-6)
    if "{n}" in corner:
        got = np.unique(np.column_stack([mesh.vertices, part.normals]).round(6), axis=0)
        np.testing.assert_allclose(got, rows(normals[23 - numbers.ravel()]), atol=1e-6)


def test_faces_without_texture_coordinates_have_the_colour_of_their_material(tmp_path):
    (tmp_path / "a.mtl").write_text("newmtl m\nKd 1 0 0\nmap_Kd t.png\n", encoding="utf-8")
    (tmp_path / "t.png").write_bytes(png((10, 20, 30, 255)))
    text = f"mtllib a.mtl\nusemtl m\n{VERTICES}vt 0 0\nf 1/1 2/1 4/1 3/1\nf 5 7 8 6\n"
    mesh, codes = read(tmp_path, "a.obj", text)
    colors = {part.uv is None: part.material.base_color for part in mesh.parts}
    assert colors == {False: (1, 1, 1, 1), True: (1, 0, 0, 1)}
    assert codes == {"appearance_ignored": 1, "texture_without_uv": 1}


def test_attributes_that_do_not_exist_or_of_some_corners_cost_themselves(tmp_path):
    for face in ("f 1/1 2/9 4/1 3/1", "f 1/1 2 4/1 3/1", "f 1/0 2/1 4/1 3/1"):
        text = (VERTICES + ATTRIBUTES + FACES).replace(FIRST, face + "\n")
        mesh, codes = read(tmp_path, "a.obj", text)
        assert_box(mesh)
        assert codes == {"attribute_mismatch": 1}


@pytest.mark.parametrize("scale", [1, 255])
@pytest.mark.parametrize("alpha", ["", " {}"])
def test_vertex_colours(tmp_path, scale, alpha):
    colors = [(51 * (k % 6), 255 - 17 * k, 255) for k in range(8)]
    lines = [
        f"v {x} {y} {z} " + " ".join(str(value * scale / 255) for value in color)
        for (x, y, z), color in zip(BOX, colors, strict=True)
    ]
    text = "\n".join(line + alpha.format(scale) for line in lines) + "\n" + FACES
    mesh, codes = read(tmp_path, "a.obj", text)
    assert_box(mesh)
    assert codes == {}
    for point, color in zip(BOX, colors, strict=True):
        assert measures.colors_at(mesh, point) == {(*color, 255)}


def test_a_weight_of_vertices_is_not_a_factor(tmp_path):
    mesh, codes = read(tmp_path, "a.obj", VERTICES.replace("\n", " 1.0\n") + FACES)
    assert_box(mesh)
    assert codes == {}
    mesh, codes = read(tmp_path, "a.obj", VERTICES.replace("\n", " 2.0\n") + FACES)
    assert_box(mesh)
    assert codes == {"unknown_attribute": 8}


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("l 1 2 3", "lines_left_out"),
        ("p 1", "points_left_out"),
        ("curv 0 1 1 2", "curves_left_out"),
        ("cstype bezier\ndeg 3 3\nsurf 0 1 0 1 1 2 3 4\nend", "curves_left_out"),
        ("wheel 1 2 3", "unknown_element"),
        ("vw 1 2 3", "unknown_element"),
        ("face 1 2 3", "unknown_element"),
        ("call other.obj", "unsupported_primitive"),
        ("usemap wood", "appearance_ignored"),
        ("#MRGB 00ff00ff", "appearance_ignored"),
        ("f", "degenerate_polygon"),
        ("f 1 2", "degenerate_polygon"),
        ("usemtl gone", "material_missing"),
        ("mtllib gone.mtl", "side_file_missing"),
        ("v 1 2", "invalid_value"),
        ("v 1 2 3 4 5", "unknown_attribute"),
    ],
)
def test_what_is_left_out_gives_a_code(tmp_path, line, code):
    for text in (VERTICES + line + "\n" + FACES, TEXT + line, VERTICES + f"  {line}\n" + FACES):
        if line.startswith("#") and "  #" in text:
            continue
        mesh, codes = read(tmp_path, "a.obj", text)
        assert_box(mesh)
        assert codes == {code: 1}


def test_empty_files_and_limits(tmp_path):
    assert rejected(tmp_path, "a.obj", "# nothing\n") == "empty_scene"
    assert rejected(tmp_path, "a.obj", VERTICES) == "points_only"
    assert rejected(tmp_path, "a.obj", TEXT, max_faces=11) == "too_many_faces"
    assert rejected(tmp_path, "a.obj", TEXT.replace("v 1.0", "v inf")) == "non_finite_vertices"


def parts_by_color(mesh) -> dict[tuple[float, ...], int]:
    return {
        tuple(np.round(part.material.base_color[:3], 3)): part.faces.stop - part.faces.start
        for part in mesh.parts
    }


RED, BLUE = "newmtl red\nKd 1 0 0\n", "newmtl blue\nKd 0 0 1\n"
HALVES = "usemtl red\n" + FACES[: len(FACES) // 2] + "usemtl blue\n" + FACES[len(FACES) // 2 :]


@pytest.mark.parametrize(
    "head",
    [
        "mtllib my red.mtl\nmtllib blue.mtl\n",
        "mtllib my red.mtl blue.mtl\n",
        "mtllib blue.mtl my red.mtl # two files\n",
        "# mtllib none.mtl\n  mtllib\tMY RED.MTL\nmtllib Blue.MTL\n",
        'mtllib "my red.mtl"\nmtllib .\\blue.mtl\n',
        "# usemtl red\nmtllib my red.mtl\nmtllib C:\\work\\blue.mtl\n",
    ],
)
def test_several_libraries_with_any_names(tmp_path, head):
    (tmp_path / "my red.mtl").write_text(RED, encoding="utf-8")
    (tmp_path / "blue.mtl").write_text(BLUE, encoding="utf-8")
    mesh, codes = read(tmp_path, "a.obj", head + VERTICES + HALVES)
    assert codes == {}
    assert parts_by_color(mesh) == {(1, 0, 0): 6, (0, 0, 1): 6}


@pytest.mark.parametrize("name", ["Material #25", "RED", "red # of the body", "r\xe9d", "\u7ea2"])
@pytest.mark.parametrize("encoding", ["utf-8", "gbk", "latin-1"])
def test_names_of_materials(tmp_path, name, encoding):
    try:
        encoded = name.encode(encoding)
    except UnicodeEncodeError:
        pytest.skip("the encoding does not have the character")
    stated = b"red" if name.startswith("red #") else encoded.lower() if name == "RED" else encoded
    (tmp_path / "a.mtl").write_bytes(b"newmtl " + stated + b"\nKd 1 0 0\n")
    text = b"mtllib a.mtl\nusemtl " + encoded + b"\n" + TEXT.encode()
    mesh, codes = read(tmp_path, "a.obj", text)
    assert codes == {}
    assert parts_by_color(mesh) == {(1, 0, 0): 12}


def test_a_library_beside_the_file_is_found_under_its_name(tmp_path):
    (tmp_path / "a.mtl").write_text(RED, encoding="utf-8")
    mesh, codes = read(tmp_path, "a.obj", "mtllib old.mtl\nusemtl red\n" + TEXT)
    assert codes == {"side_file_missing": 1}
    assert parts_by_color(mesh) == {(1, 0, 0): 12}


def test_colours_that_are_not_finite_are_reported(tmp_path):
    lines = [f"v {x} {y} {z} {'nan' if k == 3 else 0.5} 0.5 0.5" for k, (x, y, z) in enumerate(BOX)]
    mesh, codes = read(tmp_path, "a.obj", "\n".join(lines) + "\n" + FACES)
    assert codes == {"invalid_value": 1}
    assert measures.colors_at(mesh, BOX[3]) == {(0, 128, 128, 255)}


@pytest.mark.parametrize("seed", range(5))
def test_meshes_of_another_writer(tmp_path, seed):
    generator = np.random.default_rng(seed)
    source = trimesh.creation.icosphere(subdivisions=seed % 3)
    source.vertices *= generator.uniform(0.5, 2, (len(source.vertices), 1))
    if seed % 2:
        source.visual = trimesh.visual.TextureVisuals(
            uv=generator.random((len(source.vertices), 2))
        )
    text = source.export(file_type="obj", include_normals=seed > 2, digits=10)
    mesh, codes = read(tmp_path, "a.obj", text)
    assert not codes.keys() - {"material_missing", "side_file_missing"}
    np.testing.assert_allclose(mesh.vertices[mesh.faces], source.triangles, atol=1e-8)


@pytest.mark.parametrize("text", [TEXT, VERTICES + ATTRIBUTES + FACES.replace(" ", " 1/1/1 ", 1)])
def test_damaged_files_are_loaded_or_rejected(tmp_path, text):
    measures.assert_fuzzed_files_are_safe(tmp_path, "a.obj", text.encode(), rounds=150)


@pytest.mark.parametrize("face", ["f 1.5 2 3\n", "f nan 2 3\n", "f 1e999 2 3\n"])
def test_an_index_that_is_no_integer_refers_to_no_vertex(tmp_path, face):
    """1.5 was read as 1."""
    mesh, codes = read(tmp_path, "a.obj", TEXT + face)
    assert codes == {"invalid_value": 1, "index_out_of_range": 1}
    assert_box(mesh)


def test_texture_coordinates_that_are_no_numbers_are_reported(tmp_path):
    """They became 0. A single number is a coordinate of one dimension."""
    faces = "".join(
        "f " + " ".join(f"{i + 1}/{k + 1}" for k, i in enumerate(q)) + "\n" for q in QUADS
    )
    for line in ("vt 1", "vt nan 1", "vt 1 inf", "vt"):
        text = VERTICES + f"vt 0 0\nvt 1 0\n{line}\nvt 0 1\n" + faces
        mesh, codes = read(tmp_path, "a.obj", text)
        assert codes.keys() == (set() if line == "vt 1" else {"invalid_value"}), line
        assert_box(mesh)
