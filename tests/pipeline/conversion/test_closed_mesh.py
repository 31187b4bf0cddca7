"""Closed meshes from open, nested and thin ones, checked by another library."""

import json
from pathlib import Path

import numpy as np
import pytest
import trimesh

from pipeline import watertight
from pipeline.conversion.closed_mesh import close_mesh, fill_hollows
from pipeline.conversion.config import WatertightConfig, max_thickening
from pipeline.core.errors import Reject, UserError
from pipeline.core.grid import spacing
from pipeline.core.schema import Mesh
from tests.pipeline import known_shapes as geo

R = 96
BOX = trimesh.creation.box((2.0, 1.0, 0.8))


def close(shape, **options):
    """Close a mesh. Return it as another library sees it, and the report."""
    options = {"resolution": R, "samples": 20_000, **options}
    cfg = WatertightConfig(mesh=Path("in.obj"), **options)
    mesh = shape if isinstance(shape, Mesh) else geo.as_mesh(shape)
    (vertices, faces), report = close_mesh(mesh, cfg)
    closed = trimesh.Trimesh(vertices, faces, process=False)
    assert closed.is_watertight
    assert closed.is_winding_consistent
    assert closed.volume > 0
    return closed, report


def without_faces(shape, count):
    """Remove the first faces that point upwards."""
    up = np.flatnonzero(shape.face_normals[:, 1] > 0.99)[:count]
    return trimesh.Trimesh(shape.vertices, np.delete(shape.faces, up, axis=0), process=False)


def test_a_closed_mesh_keeps_its_place_and_size():
    moved = BOX.copy()
    moved.apply_scale(30.0)
    moved.apply_translation((100.0, -20.0, 7.0))
    closed, report = close(moved)
    voxel = 60 * spacing(R) / 0.95
    np.testing.assert_allclose(closed.bounds, moved.bounds, atol=0.05 * voxel)
    assert closed.volume == pytest.approx(moved.volume, rel=0.01)
    assert (report.openings, report.shells, report.buried_share, report.hollows) == (0, 0, 0, 0)
    assert (report.pieces, report.input_faces, report.faces) == (1, 12, len(closed.faces))
    assert report.metrics.f1[0.005] > 0.95  # the cells of the grid cut the edges
    assert report.voxel == pytest.approx(voxel / 60)


def test_a_missing_triangle_is_an_opening_that_is_closed():
    closed, report = close(without_faces(BOX, 1), max_opening=0.3)
    assert report.openings == 1
    assert report.cap_share == pytest.approx(1.0 / (BOX.area - 0.8), rel=0.5)
    assert closed.volume == pytest.approx(BOX.volume, rel=0.02)
    # the cap lies away from the input: that is the largest distance to it
    m = report.metrics
    assert m.max_accuracy > 20 * m.max_completeness
    assert m.max_accuracy == pytest.approx(0.3, abs=0.1)


def test_an_open_surface_becomes_a_shell():
    sheet = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [1, 0, 1], [0, 0, 1]], [[0, 1, 2], [0, 2, 3]])
    closed, report = close(sheet)
    assert (report.shells, report.openings, report.sheet_share) == (1, 0, 1.0)
    assert closed.extents[1] == pytest.approx(report.shell_thickness, rel=0.05)


def test_two_open_surfaces_are_two_shells():
    sheet = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [1, 0, 1]], [[0, 1, 2]], process=False)
    other = sheet.copy()
    other.apply_translation((0, 0.4, 0))
    _, report = close(geo.as_mesh(sheet, other))
    assert (report.shells, report.pieces) == (2, 2)


def test_inner_walls_are_removed():
    inner = trimesh.creation.icosphere(radius=0.2)
    closed, report = close(geo.as_mesh(BOX, inner))
    assert report.pieces == 1
    assert report.buried_share == pytest.approx(inner.area / (inner.area + BOX.area), rel=1e-6)
    assert closed.volume == pytest.approx(BOX.volume, rel=0.02)


def test_thickening_moves_the_surface_outwards_and_saves_thin_walls():
    closed, report = close(BOX, thicken=0.25, resolution=256)
    voxel = 2 * spacing(256) / 0.95
    np.testing.assert_allclose(closed.extents, BOX.extents + 0.5 * voxel, atol=0.05 * voxel)
    assert report.metrics.accuracy / (2 * 0.95 * report.voxel) == pytest.approx(0.25, abs=0.05)
    # between two planes of the grid, a plate holds no grid point
    plate = trimesh.creation.box((2.0, 0.001, 1.0))
    with pytest.raises(Reject, match="no_surface"):
        close(plate, resolution=512)
    closed, _ = close(plate, resolution=512, thicken=1.0)
    assert closed.extents[1] == pytest.approx(0.001 + 2 * 2 * spacing(512) / 0.95, rel=0.1)


def test_thickening_is_limited_by_the_band():
    assert [max_thickening(r) for r in (256, 384, 512, 1024)] == [0.26, 1.26, 2.26, 2.26]
    with pytest.raises(ValueError, match=r"thicken must be from 0 to 2\.26 at resolution 512"):
        WatertightConfig(mesh=Path("a.obj"), thicken=2.5)


def test_enclosed_hollows_are_filled():
    ball, hollow = (trimesh.creation.icosphere(subdivisions=2, radius=r) for r in (0.5, 0.2))
    hollow.invert()
    both = geo.as_mesh(hollow, ball)
    vertices, faces, hollows = fill_hollows(both.vertices, both.faces)
    assert hollows == 1
    np.testing.assert_array_equal(vertices[faces], ball.vertices[ball.faces])


def test_the_command_writes_the_mesh_and_the_report(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    BOX.export("box.obj")
    watertight.main(["box.obj", "--resolution", "64", "--samples", "1000", "--report", "r.json"])
    assert trimesh.load("box.closed.glb", force="mesh").is_volume
    content = json.loads(Path("r.json").read_text(encoding="utf-8"))
    assert (content["openings"], content["pieces"]) == (0, 1)
    assert "No opening had to be closed." in caplog.text
    assert caplog.messages[-1] == "The closed mesh is box.closed.glb."


def test_bad_input_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    BOX.export("box.obj")
    Path("empty.obj").touch()
    Path("text.stl").write_text("hello", encoding="utf-8")
    for args, message in (
        (["none.obj"], r"^none.obj is not a file"),
        (["empty.obj"], r"^empty.obj cannot be closed: empty_file"),
        (["text.stl"], r"^text.stl cannot be closed: "),
        (["box.obj", "-o", "a.fbx"], r"^--output must end in one of .glb, .obj, .ply, .stl, got"),
        (["box.obj", "-o", "box.obj"], r"^box.obj would be replaced"),
        (["box.obj", "--resolution", "100"], r"^--resolution must be a positive multiple of 8"),
        (["box.obj", "--thicken", "9"], r"^--thicken must be from 0 to 2.26"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            watertight.main(args)
        assert "\n" not in str(caught.value)
