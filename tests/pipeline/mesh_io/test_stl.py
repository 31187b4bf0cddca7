"""STL files: text and binary, several solids, wrong counts, names with keywords, colours."""

import struct

import numpy as np
import pytest

from tests.pipeline.mesh_io import measures
from tests.pipeline.mesh_io.measures import BOX, QUADS, area, assert_box, read, rejected, volume

TRIANGLES = BOX[[[q[a], q[b], q[c]] for q in QUADS for a, b, c in ((0, 1, 2), (0, 2, 3))]]


def binary(corners=TRIANGLES, *, count=None, header=b"", attributes=None) -> bytes:
    attributes = attributes or [0] * len(corners)
    data = header.ljust(80, b"\0") + struct.pack("<I", len(corners) if count is None else count)
    for triangle, attribute in zip(corners, attributes, strict=True):
        data += struct.pack("<12fH", 0, 0, 1, *triangle.ravel(), attribute)
    return data


def facet(points) -> str:
    vertices = "".join(f"   vertex {x:.9g} {y:.9g} {z:.9g}\n" for x, y, z in points)
    return f" facet normal 0 0 1\n  outer loop\n{vertices}  endloop\n endfacet\n"


def text(corners=TRIANGLES, name="box") -> str:
    return f"solid {name}\n" + "".join(map(facet, corners)) + f"endsolid {name}\n"


@pytest.mark.parametrize(
    "content",
    [
        binary(),
        binary(header=b"solid facet vertex"),
        binary(header=b"solid facet normal 0 0 1".ljust(80)),
        text(),
        text().upper(),
        text().replace("\n", "\r\n"),
        text().replace("\n", "\r"),
        text().replace("\n", " "),
        text().replace(" ", "\t"),
        "\ufeff" + text(),
        text().encode("utf-16"),
        text(name=""),
        text(name="vertex 1 2 3 facet endfacet"),
        text(name="the endsolid of the facet normal"),
        text(name="a\xe9").encode("latin-1"),
        text(TRIANGLES[:5], "one") + text(TRIANGLES[5:], "solid two"),
        text(TRIANGLES[:5], "one") + "\n\n" + text(TRIANGLES[5:], "endsolid"),
        text().replace("1\n", "1.0E+0\n"),
    ],
)
def test_every_spelling_gives_the_box(tmp_path, content):
    mesh, codes = read(tmp_path, "a.stl", content)
    assert_box(mesh)
    assert codes == {}


@pytest.mark.parametrize("count", [0, 1, 11])
def test_a_count_that_is_too_small_costs_no_triangles(tmp_path, count):
    mesh, codes = read(tmp_path, "a.stl", binary(count=count))
    assert_box(mesh)
    assert codes == {"count_mismatch": 1}
    mesh, codes = read(tmp_path, "a.stl", binary(count=count) + b"\1")
    assert_box(mesh)
    assert codes == {"count_mismatch": 1, "trailing_data": 1}


def test_a_count_that_is_too_large_is_truncated_data(tmp_path):
    mesh, codes = read(tmp_path, "a.stl", binary(count=13))
    assert_box(mesh)
    assert codes == {"truncated_data": 1}
    mesh, codes = read(tmp_path, "a.stl", binary()[:-20])
    assert len(mesh.faces) == 11
    assert codes == {"truncated_data": 1}


def test_two_binary_files_in_one_are_both_read(tmp_path):
    content = binary(TRIANGLES[:5]) + binary(TRIANGLES[5:7]) + binary(TRIANGLES[7:])
    mesh, codes = read(tmp_path, "a.stl", content)
    assert_box(mesh)
    assert codes == {"count_mismatch": 1}


@pytest.mark.parametrize(
    "trailer",
    [b"\0", b"\n", b"made with care", b"\xff" * 50, b"\0" * 50, b"x" * 100, bytes(range(200))],
    ids=len,
)
def test_other_bytes_after_the_last_triangle_are_trailing_data(tmp_path, trailer):
    mesh, codes = read(tmp_path, "a.stl", binary() + trailer)
    assert_box(mesh)
    assert codes == {"trailing_data": 1}


def test_a_text_that_ends_early_is_read_up_to_there(tmp_path):
    content = text()[: text().rindex("vertex")]
    mesh, codes = read(tmp_path, "a.stl", content)
    assert len(mesh.faces) == 11
    assert codes == {"truncated_data": 1}
    assert rejected(tmp_path, "a.stl", "solid a\n facet normal 0 0 1\n") == "unreadable"
    assert rejected(tmp_path, "a.stl", "solid a\nendsolid a\n") == "empty_scene"


def test_unknown_words_give_a_code(tmp_path):
    for place in ("solid box\n", "facet normal 0 0 1\n", "outer loop\n", "endloop\n", "endfacet\n"):
        mesh, codes = read(tmp_path, "a.stl", text().replace(place, f"{place} color 3\n", 1))
        assert_box(mesh)
        assert codes == {"unknown_element": 2}
    mesh, codes = read(tmp_path, "a.stl", text() + "made with care\n")
    assert_box(mesh)
    assert codes == {"unknown_element": 3}


def test_a_facet_with_more_vertices_is_a_polygon(tmp_path):
    content = f"solid u\n{facet([(x, y, 0) for x, y in measures.U_SHAPE])}endsolid u\n"
    mesh, codes = read(tmp_path, "a.stl", content)
    assert area(mesh) == pytest.approx(measures.U_AREA)
    assert codes == {}


def test_a_facet_with_two_vertices_costs_itself(tmp_path):
    # The next facet has four vertices, so the number of vertices is right.
    content = f"solid u\n{facet(TRIANGLES[0][:2])}{facet(BOX[QUADS[0]])}endsolid u\n"
    mesh, codes = read(tmp_path, "a.stl", content)
    assert area(mesh) == pytest.approx(6)
    assert codes == {"degenerate_polygon": 1}


def test_a_vertex_that_is_not_a_number_is_rejected(tmp_path):
    content = text().replace("vertex 0 0 0", "vertex nan 0 0", 1)
    assert rejected(tmp_path, "a.stl", content) == "non_finite_vertices"
    content = text().replace("vertex 0 0 0", "vertex zero 0 0", 1)
    mesh, codes = read(tmp_path, "a.stl", content)
    assert len(mesh.faces) == 11
    assert codes["invalid_value"] == 1


def attribute(red: int, green: int, blue: int, bit: int) -> int:
    """Return 5-bit channels with the first in the lowest bits."""
    return red | green << 5 | blue << 10 | bit << 15


def test_colours_of_viscam(tmp_path):
    values = [0x7FFF, *(attribute(31, 0, 4, 1) for _ in range(11))]  # blue is lowest
    mesh, codes = read(tmp_path, "a.stl", binary(attributes=values))
    assert_box(mesh)
    assert codes == {}
    colors = mesh.parts[0].colors[mesh.faces]
    assert (colors[0] == [231, 231, 231, 255]).all()  # the default colour
    assert (colors[1:] == [33, 0, 255, 255]).all()


def test_colours_of_magics(tmp_path):
    values = [attribute(0, 0, 0, 1), *(attribute(31, 0, 4, 0) for _ in range(11))]
    header = b"COLOR=\x0a\x14\x1e\xff,MATERIAL=" + b"\1" * 12
    mesh, codes = read(tmp_path, "a.stl", binary(attributes=values, header=header))
    assert_box(mesh)
    assert codes == {"appearance_ignored": 1}
    colors = mesh.parts[0].colors[mesh.faces]
    assert (colors[0] == [10, 20, 30, 255]).all()  # the object's colour
    assert (colors[1:] == [255, 0, 33, 255]).all()


def test_attribute_bytes_without_the_bit_of_colours_are_no_colours(tmp_path):
    mesh, codes = read(tmp_path, "a.stl", binary(attributes=[0x7FFF] * 12))
    assert_box(mesh)
    assert mesh.parts[0].colors is None
    assert codes == {}


def test_counts_beyond_the_limits_are_rejected(tmp_path):
    assert rejected(tmp_path, "a.stl", binary(count=400_000_000)) == "allocation_bomb"
    assert rejected(tmp_path, "a.stl", binary(), max_faces=11) == "too_many_faces"
    assert rejected(tmp_path, "a.stl", binary(count=3), max_faces=11) == "too_many_faces"
    assert rejected(tmp_path, "a.stl", text(), max_faces=11) == "too_many_faces"
    assert rejected(tmp_path, "a.stl", binary()[:83]) == "unreadable"


@pytest.mark.parametrize("kind", ["stl", "stl_ascii"])
@pytest.mark.parametrize("seed", range(4))
def test_meshes_of_another_writer(tmp_path, kind, seed):
    source = measures.bumpy_sphere(seed)
    content = source.export(file_type=kind)
    mesh, codes = read(tmp_path, "a.stl", content)
    assert codes == {}
    np.testing.assert_allclose(mesh.vertices[mesh.faces], source.triangles, atol=1e-6)
    assert volume(mesh) == pytest.approx(source.volume, rel=1e-5)


@pytest.mark.parametrize(
    "content", [binary(), text().encode(), binary(TRIANGLES[:3]) * 2], ids=["binary", "text", "two"]
)
def test_damaged_files_are_loaded_or_rejected(tmp_path, content):
    measures.assert_fuzzed_files_are_safe(tmp_path, "a.stl", content, rounds=200)
