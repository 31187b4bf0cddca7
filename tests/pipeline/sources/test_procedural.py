"""The embedded shapes: stable names and bytes, and the topology that each family promises."""

import hashlib
import json
import pickle
import struct
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from pipeline.core.errors import UserError
from pipeline.core.hashing import make_uid
from pipeline.core.schema import Mesh, Record
from pipeline.curation.config import FilterConfig
from pipeline.curation.filters import count_components, filter_geometry, weld
from pipeline.mesh_io.config import LoadConfig, NormalizeConfig
from pipeline.mesh_io.load import load_with_report
from pipeline.mesh_io.normalize import normalize
from pipeline.sources import open_source
from pipeline.sources.procedural import ProceduralSource, make_shape
from pipeline.sources.shapes import FAMILIES, basic, closed_solids, pieces, primitives, to_glb

SHEETS = {
    "flag": 1,
    "bowl": 1,
    "mobius": 1,
    "umbrella": 1,
    "lamp": 1,
    "boat": 4,
    "open_box": 9,
    "paper_plane": 4,
}
MISLEADING = {"inside_out", "shuffled", "nested_spheres"}  # not every piece faces outward
SOLID = sorted(set(FAMILIES) - set(SHEETS) - MISLEADING - {"doubled"})


def keys(count: int) -> list[str]:
    return [
        record.url.partition(":")[2]
        for record in islice(open_source("procedural").records(), count)
    ]


def mesh_of(piece: pieces.Piece) -> Mesh:
    return Mesh(vertices=piece.vertices, faces=piece.faces.astype(np.int32))


def open_edges(piece: pieces.Piece) -> int:
    """Count the directed edges without an equal number of opposite ones."""
    faces = weld(piece.vertices)[piece.faces]
    edges = Counter(
        map(tuple, np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).tolist())
    )
    return sum(edges[(b, a)] != count for (a, b), count in edges.items())


def test_the_specification_gives_the_number_of_shapes():
    few, more = (list(open_source(spec).records()) for spec in ("procedural", "procedural:2000"))
    assert (len(few), len(more)) == (300, 2000)
    assert more[:300] == few
    assert len({record.uid for record in more}) == 2000
    for wrong in ("procedural:0", "procedural:-1", "procedural:many"):
        with pytest.raises(UserError, match="1 or more"):
            open_source(wrong)


def test_names_are_stable_and_the_first_48_contain_every_family():
    records = list(open_source("procedural").records())
    assert len(records) == len({record.uid for record in records}) == 300
    assert records == list(pickle.loads(pickle.dumps(open_source("procedural"))).records())
    assert {record.url.partition("-")[2] for record in records[:48]} == set(FAMILIES)
    first = records[0]
    assert first == Record(
        uid=make_uid("procedural", "0000-torus_knot"),
        source="procedural",
        url="procedural:0000-torus_knot",
        licence="cc0-1.0",
        format="glb",
    )
    assert records[17].url == "procedural:0017-table"


def test_the_names_of_all_300_shapes_have_not_changed():
    text = "\n".join(keys(300))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "2319d143df065799"


def test_materialize_writes_the_same_bytes_each_time(tmp_path):
    source = open_source("procedural")
    for record in islice(source.records(), 4, 48, 11):
        first = source.materialize(record, tmp_path / "a").read_bytes()
        assert source.materialize(record, tmp_path / "b").read_bytes() == first
        assert [path.name for path in (tmp_path / "a").iterdir()].count(f"{record.uid}.glb") == 1
    assert not list(tmp_path.rglob("*.partial"))


def test_seeds_make_different_shapes():
    for family in ("vase", "gear", "robot"):
        shapes = {to_glb(make_shape(f"{k:04d}-{family}")) for k in range(3)}
        assert len(shapes) == 3


@pytest.mark.parametrize("key", ["0001-nothing", "torus_knot", ""])
def test_an_unknown_shape_is_an_error(key):
    with pytest.raises(ValueError, match="known family"):
        make_shape(key)


def test_a_record_of_another_source_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="procedural source"):
        ProceduralSource().materialize(Record(uid="x", source="folder", url="a.glb"), tmp_path)


@pytest.mark.parametrize("family", SOLID)
def test_every_piece_of_a_solid_is_closed_and_faces_outward(family):
    for piece in make_shape(f"0100-{family}"):
        assert open_edges(piece) == 0
        assert filter_geometry(mesh_of(piece), FilterConfig())["volume"] > 0
        assert (np.diff(np.sort(weld(piece.vertices)[piece.faces], axis=1), axis=1) > 0).all()


@pytest.mark.parametrize("family", sorted(SHEETS))
def test_sheets_are_open(family):
    assert sum(open_edges(piece) > 0 for piece in make_shape(f"0100-{family}")) == SHEETS[family]


def test_a_boat_is_closed_by_its_deck():
    hull, deck, *_ = make_shape("0037-boat")
    assert open_edges(pieces.joined([hull, deck])) == 0
    assert filter_geometry(mesh_of(pieces.joined([hull, deck])), FilterConfig())["volume"] > 0


def test_misleading_families_have_inverted_flipped_or_doubled_faces():
    for k in range(3):
        assert all(
            filter_geometry(mesh_of(p), FilterConfig())["volume"] < 0
            for p in make_shape(f"{k}-inside_out")
        )
        assert all(open_edges(piece) > 0 for piece in make_shape(f"{k}-shuffled"))
        for piece in make_shape(f"{k}-doubled"):
            sets = Counter(map(tuple, np.sort(weld(piece.vertices)[piece.faces], axis=1).tolist()))
            assert set(sets.values()) == {2}
    outer, *inner = make_shape("0005-nested_spheres")
    reach = np.linalg.norm(outer.vertices, axis=1).min()
    assert all(np.linalg.norm(piece.vertices, axis=1).max() < 0.95 * reach for piece in inner)


def test_the_48_shapes_of_the_smoke_set_load_as_generated(tmp_path):
    """Geometry, texture coordinates and colours survive writing and loading, part by part."""
    source = open_source("procedural")
    kinds = Counter()
    for record in islice(source.records(), 48):
        pieces = make_shape(record.url.partition(":")[2])
        mesh, report = load_with_report(source.materialize(record, tmp_path), LoadConfig())
        assert report.warnings == ()
        assert len(mesh.faces) == sum(len(piece.faces) for piece in pieces)
        made = np.sort(
            np.concatenate([p.vertices[p.faces] for p in pieces]).astype(np.float32).reshape(-1, 9),
            axis=0,
        )
        np.testing.assert_array_equal(
            np.sort(mesh.vertices[mesh.faces].reshape(-1, 9), axis=0), made
        )
        for part in mesh.parts:
            assert part.normals is not None
            assert part.material.texture is None or part.uv is not None
            kinds += Counter(
                textured=part.material.texture is not None, colored=part.colors is not None
            )
            kinds["metallic"] += part.material.metallic > 0
        kinds["several looks"] += len(mesh.parts) > 1
        numbers = filter_geometry(normalize(mesh, NormalizeConfig()), FilterConfig())
        assert numbers["components"] == count_components(mesh.vertices, mesh.faces)
    assert min(kinds[k] for k in ("textured", "colored", "metallic", "several looks")) >= 5


@pytest.mark.slow
def test_all_300_pass_the_default_filters(tmp_path):
    source = open_source("procedural")
    for record in source.records():
        mesh, report = load_with_report(source.materialize(record, tmp_path), LoadConfig())
        filter_geometry(normalize(mesh, NormalizeConfig()), FilterConfig())
        assert report.warnings == ()


@pytest.mark.parametrize(
    ("piece", "volume", "tolerance"),
    [
        (closed_solids.box(1, 2, 3), 6, 1e-12),
        (closed_solids.sphere(1.0, 192, 96), 4 / 3 * np.pi, 2e-3),
        (closed_solids.torus(1.0, 0.3, 192, 96), 2 * np.pi**2 * 0.09, 2e-3),
        (closed_solids.capsule(0.5, 2.0, 192, 48), np.pi * (0.5 + 4 / 24), 2e-3),
        (closed_solids.cylinder(1.0, 2.0, 192), 2 * np.pi, 1e-3),
        (closed_solids.cylinder(1.0, 3.0, 192, top=0.0), np.pi, 1e-3),
        (closed_solids.polyhedron("octahedron"), 4 / 3, 1e-12),
        (closed_solids.polyhedron("icosahedron"), 2.53615, 1e-5),
        (primitives.extrude([(0, 0), (2, 0), (2, 1), (1, 1), (1, 2), (0, 2)], 0.5), 1.5, 1e-12),
        (
            primitives.ring(closed_solids.circle(2.0, 4), closed_solids.circle(1.0, 4), 0.5),
            3.0,
            1e-12,
        ),
        (
            closed_solids.rod(0.1, 4).placed_between((1, 2, 3), (4, 6, 3)),
            5 * 0.02,
            1e-12,
        ),
        (closed_solids.tube([(0, 0, 0), (0, 0, 2.0)], 0.1, 4), 0.04, 1e-12),
    ],
    ids=[
        "box",
        "sphere",
        "torus",
        "capsule",
        "cylinder",
        "cone",
        "octa",
        "icosa",
        "extrude",
        "ring",
        "aimed",
        "tube",
    ],
)
def test_primitives_have_the_right_volume(piece, volume, tolerance):
    assert open_edges(piece) == 0
    assert filter_geometry(mesh_of(piece), FilterConfig())["volume"] == pytest.approx(
        volume, rel=tolerance
    )


@pytest.mark.parametrize("name", sorted(basic.LETTERS))
def test_letters_are_cut_into_triangles_without_gap_or_overlap(name):
    outline = np.array(basic.LETTERS[name], dtype=np.float64)
    x, y = outline.T
    shoelace = (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2
    assert filter_geometry(mesh_of(primitives.extrude(outline, 2.0)), FilterConfig())[
        "volume"
    ] == pytest.approx(2 * shoelace)


@pytest.mark.parametrize(
    "outline", [[(0, 0), (0, 1), (1, 1), (1, 0)], [(0, 0), (1, 1), (1, 0), (0, 1)]]
)
def test_a_clockwise_or_crossing_outline_is_an_error(outline):
    with pytest.raises(ValueError, match="simple and counter-clockwise"):
        primitives.extrude(outline, 1.0)


def test_rotations_are_right_handed():
    x, y, z = (
        pieces.Piece(vertices=row[None], faces=np.zeros((0, 3), dtype=int)) for row in np.eye(3)
    )
    for piece, axis, result in ((x, "z", y), (y, "x", z), (z, "y", x)):
        np.testing.assert_allclose(piece.rotated(axis, 90).vertices, result.vertices, atol=1e-15)


def document_of(data: bytes) -> dict:
    magic, version, length, size, kind = struct.unpack_from("<4sIII4s", data)
    assert (magic, version, length, kind) == (b"glTF", 2, len(data), b"JSON")
    return json.loads(data[20 : 20 + size])


def test_a_glb_states_its_sizes_exactly():
    document = document_of(to_glb(make_shape("0014-house")))
    for view in document["bufferViews"]:
        assert view["byteOffset"] % 4 == 0
        assert view["byteOffset"] + view["byteLength"] <= document["buffers"][0]["byteLength"]
    for accessor in document["accessors"]:
        width = {"SCALAR": 1, "VEC2": 2, "VEC3": 3}[accessor["type"]]
        assert (
            document["bufferViews"][accessor["bufferView"]]["byteLength"]
            == 4 * width * accessor["count"]
        )


def test_normals_are_smooth_on_a_sphere_and_split_at_the_edges_of_a_box():
    from pipeline.sources.shapes.glb import split_at_creases

    vertices, _, normals, _ = split_at_creases(closed_solids.sphere(1.0, 96, 48))
    assert (normals * vertices).sum(axis=1).min() > 0.999
    joined = primitives.extrude([(-1, -1), (1, -1), (1, 1), (-1, 1)], 2.0)  # eight shared corners
    vertices, faces, normals, source = split_at_creases(joined)
    assert len(vertices) == 24
    assert sorted(map(tuple, np.abs(normals).round(6).tolist()))[0] == (0.0, 0.0, 1.0)
    np.testing.assert_array_equal(vertices[faces], joined.vertices[joined.faces])
    np.testing.assert_array_equal(vertices, joined.vertices[source])


def test_texture_coordinates_and_colours_survive_the_file(tmp_path):
    quad = primitives.surface(
        np.array([[(0, 0, 0), (0, 1, 0)], [(1, 0, 0), (1, 1, 0)]], dtype=np.float64)
    )
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    textured = quad.painted(pieces.Paint(texture=image))
    tinted = quad.translated(z=1).colored(lambda p: np.column_stack([p[:, :2] / 2, 0 * p[:, 2]]))
    (tmp_path / "a.glb").write_bytes(to_glb([textured, tinted]))
    mesh, _ = load_with_report(tmp_path / "a.glb", LoadConfig())
    for part in mesh.parts:
        place = mesh.vertices[part.vertices]
        if part.colors is None:
            np.testing.assert_allclose(part.uv, place[:, :2])  # v = 0 at the bottom
            np.testing.assert_array_equal(part.material.texture[..., :3], image)
        else:
            np.testing.assert_allclose(part.colors[:, :2], place[:, :2] * 127.5, atol=1)


def test_files_stay_small():
    sizes = [len(to_glb(make_shape(key))) for key in keys(48)[::12]]
    assert max(sizes) < 600_000
