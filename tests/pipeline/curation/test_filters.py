"""Filter rules on shapes whose measurements are known."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import Reject
from pipeline.core.schema import Mesh, Record
from pipeline.curation.config import FilterConfig
from pipeline.curation.filters import (
    count_components,
    filter_file,
    filter_geometry,
    filter_metadata,
    weld,
)
from pipeline.sources.shapes import closed_solids, pieces, primitives

CFG = FilterConfig()


def mesh_of(*solids: pieces.Piece) -> Mesh:
    whole = pieces.joined(list(solids))
    return Mesh(vertices=whole.vertices, faces=whole.faces.astype(np.int32))


def rejects(reason: str, mesh: Mesh, cfg: FilterConfig = CFG) -> dict:
    with pytest.raises(Reject) as caught:
        filter_geometry(mesh, cfg)
    assert caught.value.reason == reason
    return caught.value.numbers


def test_a_box_far_from_the_origin_has_the_right_numbers():
    numbers = filter_geometry(mesh_of(closed_solids.box(1, 2, 3).translated(x=1000)), CFG)
    assert numbers["faces"] == 12
    assert numbers["vertices"] == 24
    assert numbers["components"] == 1  # six separate faces with common corners
    assert numbers["area"] == pytest.approx(22)
    assert numbers["volume"] == pytest.approx(6)


def test_volume_is_negative_inside_out():
    assert filter_geometry(mesh_of(closed_solids.box(1, 1, 1).flipped()), CFG)[
        "volume"
    ] == pytest.approx(-1)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_components_share_no_corner(count):
    mesh = mesh_of(*(closed_solids.torus(1.0, 0.2).translated(x=3 * k) for k in range(count)))
    assert filter_geometry(mesh, CFG)["components"] == count


def test_a_common_corner_connects_and_unused_vertices_do_not_count():
    a, b = np.eye(3), np.array([[1.0, 0, 0], [5, 5, 5], [6, 5, 5]])
    points = np.concatenate([a, b, [[9.0, 9, 9]]])
    faces = np.array([[0, 1, 2], [3, 4, 5]], dtype=np.int32)
    assert count_components(points, faces) == 1
    assert count_components(points + np.array([0, 0, 0, 1, 0, 0, 0])[:, None] * 1e-9, faces) == 2


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.sampled_from([0.0, -0.0, 1.0, 1.0 + 2**-52, -1.0])] * 3),
        min_size=1,
        max_size=40,
    )
)
def test_weld_joins_exactly_equal_positions(points):
    labels = weld(np.array(points))
    for i, p in enumerate(points):
        for j, q in enumerate(points):
            assert (labels[i] == labels[j]) == (p == q)


def test_weld_is_right_if_hashes_collide(monkeypatch):
    points = np.random.default_rng(0).integers(0, 3, (200, 3)).astype(np.float64)
    expected = weld(points)
    unique = np.unique

    def colliding(values, **options):
        return unique(values if values.ndim == 2 else values % np.uint64(5), **options)

    monkeypatch.setattr(np, "unique", colliding)
    labels = weld(points)
    assert ((labels[:, None] == labels) == (expected[:, None] == expected)).all()


def test_a_box_passes_the_defaults_and_limits_are_inclusive():
    box = mesh_of(closed_solids.box(1, 1, 1))
    filter_geometry(box, FilterConfig(min_faces=12, max_faces=12))
    assert rejects("too_few_faces", box, FilterConfig(min_faces=13)) == {
        "faces": 12,
        "min_faces": 13,
    }
    assert rejects("too_many_faces", box, FilterConfig(max_faces=11)) == {
        "faces": 12,
        "max_faces": 11,
    }


def test_a_mesh_without_faces_is_rejected():
    rejects("too_few_faces", Mesh(vertices=np.eye(3), faces=np.zeros((0, 3), dtype=np.int32)))


def grid(height) -> Mesh:
    u = np.linspace(0, 1, 9)
    x, y = np.meshgrid(u, u, indexing="ij")
    return mesh_of(primitives.surface(np.stack([x, y, height(x, y)], axis=-1)))


@pytest.mark.parametrize("tilt", [0.0, 0.7])
def test_a_plane_in_any_orientation_is_flat_and_a_wavy_sheet_is_not(tilt):
    numbers = rejects("flat", grid(lambda x, y: tilt * (x + 2 * y)), FilterConfig())
    assert numbers["min_thickness"] == 1e-5
    assert numbers["extents"][2] < 1e-5 * numbers["extents"][0]
    assert (
        filter_geometry(grid(lambda x, y: tilt * x + 0.01 * np.sin(5 * x)), CFG)["components"] == 1
    )


def test_a_flat_sheet_passes_where_flatness_is_allowed():
    filter_geometry(grid(lambda x, y: 0 * x), FilterConfig(min_thickness=0.0))


@pytest.mark.parametrize(
    "points",
    [[[0, 0, 0]] * 3, [[0, 0, 0], [1, 1, 1], [2, 2, 2]], [[0, 0, 0], [1, 0, 0], [0.5, 1e-5, 0]]],
    ids=["a point", "a line", "nearly a line"],
)
def test_a_point_or_a_line_is_degenerate(points):
    faces = np.tile(np.array([[0, 1, 2]], dtype=np.int32), (5, 1))
    mesh = Mesh(vertices=np.array(points, dtype=np.float64), faces=faces)
    numbers = rejects("degenerate", mesh, FilterConfig())
    assert (numbers["min_area"], numbers["min_width"]) == (1e-4, 1e-3)


def test_a_thin_rod_is_not_a_line():
    filter_geometry(mesh_of(closed_solids.cylinder(0.005, 2.0)), CFG)


def test_too_many_degenerate_faces_are_rejected():
    box = mesh_of(closed_solids.box(1, 1, 1))
    junk = np.tile(np.array([[0, 1, 1]], dtype=np.int32), (13, 1))
    spoiled = Mesh(vertices=box.vertices, faces=np.concatenate([box.faces, junk]))
    assert rejects("degenerate_faces", spoiled)["share"] == pytest.approx(13 / 25)
    filter_geometry(Mesh(vertices=box.vertices, faces=spoiled.faces[:-2]), CFG)


def test_too_many_components_are_rejected():
    boxes = mesh_of(*(closed_solids.box(1, 1, 1).translated(x=2 * k) for k in range(4)))
    assert rejects("too_many_components", boxes, FilterConfig(max_components=3))["components"] == 4
    filter_geometry(boxes, FilterConfig(max_components=4))


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
def test_verdicts_and_counts_do_not_depend_on_the_frame(scale, shift):
    for piece in (closed_solids.box(1, 1e-3, 1), closed_solids.torus(1, 0.3, 12, 6)):
        moved = Mesh(vertices=piece.vertices * scale + shift, faces=piece.faces.astype(np.int32))
        numbers, base = filter_geometry(moved, CFG), filter_geometry(mesh_of(piece), CFG)
        assert numbers["area"] == pytest.approx(base["area"] * scale**2, rel=1e-4)
        assert numbers["faces"] == base["faces"]


def test_files_of_the_wrong_size_are_rejected(tmp_path):
    path = tmp_path / "a.glb"
    path.write_bytes(b"x" * 10)
    assert filter_file(path, FilterConfig(min_bytes=10, max_bytes=10)) == {"bytes": 10}
    for cfg, reason in (
        (FilterConfig(min_bytes=11), "file_too_small"),
        (FilterConfig(max_bytes=9), "file_too_large"),
    ):
        with pytest.raises(Reject) as caught:
            filter_file(path, cfg)
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("licence", "source", "cfg", "passes"),
    [
        ("unknown", "folder", CFG, True),  # the user named the folder
        ("unknown", "objaverse", CFG, False),
        ("", "objaverse", CFG, False),
        ("unknown", "objaverse", FilterConfig(licences=("by", "unknown")), True),
        ("by-nc", "objaverse", FilterConfig(licences=("by", "cc0")), False),
        ("BY", "objaverse", FilterConfig(licences=("by", "cc0")), True),
        ("by", "objaverse", FilterConfig(licences=("CC BY 4.0",)), True),
        ("by", "objaverse", CFG, True),
        ("by-nc", "objaverse", CFG, False),
        ("by-nd", "objaverse-xl", CFG, False),
        ("shapenet", "shapenet", CFG, False),
        ("shapenet", "shapenet", FilterConfig(licences=("shapenet",)), True),
    ],
)
def test_only_accepted_licences_pass(licence, source, cfg, passes):
    record = Record(uid="x", source=source, url="x", licence=licence, format="obj")
    if passes:
        filter_metadata(record, cfg)
    else:
        with pytest.raises(Reject, match="licence"):
            filter_metadata(record, cfg)


@pytest.mark.parametrize(
    ("metadata", "cfg", "reason"),
    [
        ({}, CFG, ""),
        ({"age_restricted": True}, CFG, "age_restricted"),
        ({"age_restricted": True}, FilterConfig(age_restricted=True), ""),
        ({"animations": 3}, CFG, ""),
        ({"animations": 3}, FilterConfig(max_animations=2), "animated"),
        ({"animations": 3}, FilterConfig(max_animations=3), ""),
        ({"name": "An HDRI of a garden"}, CFG, "banned_word"),
        ({"name": "Lidargate"}, CFG, ""),  # whole words
        ({"tags": ["tree", "Point-Cloud"]}, CFG, "banned_word"),
        ({"tags": ["tree"]}, FilterConfig(banned_words=("tree",)), "banned_word"),
    ],
)
def test_catalogue_metadata_decides_by_the_options(metadata, cfg, reason):
    record = Record(
        uid="x",
        source="objaverse",
        url="x",
        licence="by",
        format="glb",
        metadata=json.dumps(metadata),
    )
    if not reason:
        filter_metadata(record, cfg)
    else:
        with pytest.raises(Reject) as caught:
            filter_metadata(record, cfg)
        assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("name", "blender", "reason"),
    [("max", "", "unsupported_format"), ("blend", "", "missing_blender"), ("blend", "x", "")],
)
def test_a_format_that_is_not_read_is_rejected(name, blender, reason):
    record = Record(uid="x", source="objaverse-xl", url="x", licence="by", format=name)
    if not reason:
        filter_metadata(record, CFG, blender)
    else:
        with pytest.raises(Reject, match=f"{reason} format={name}"):
            filter_metadata(record, CFG, blender)


@pytest.mark.slow
def test_a_sheet_of_two_million_faces_is_one_component():
    u = np.linspace(0, 1, 1001)
    x, y = np.meshgrid(u, u, indexing="ij")
    sheet = primitives.surface(np.stack([x, y, np.sin(3 * x) * y], axis=-1))
    numbers = filter_geometry(
        Mesh(vertices=sheet.vertices, faces=sheet.faces.astype(np.int32)), CFG
    )
    assert numbers["components"] == 1
