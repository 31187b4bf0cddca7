"""The meshes and the list of the report: sizes, colours, choice, and assets that cannot be read."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import trimesh

from pipeline.core.schema import Material, Mesh, Part
from pipeline.inspection import report_assets
from pipeline.inspection.config import ReportConfig
from pipeline.inspection.report_assets import asset_list, choose_shown
from pipeline.inspection.report_meshes import face_colors, pack_mesh, simplify
from pipeline.orchestration.isolated_process import ProcessExit
from pipeline.orchestration.plan import read_plan
from pipeline.storage.manifest import ManifestRow
from tests.pipeline.conversion.small_builds import make_build

RED, BLUE = (0.8, 0.0, 0.0, 1.0), (0.0, 0.0, 0.6, 1.0)


def unpack(data):
    """Read a packed mesh as build_report.js does: positions, faces and the colour of each face."""
    vertices, faces, groups = struct.unpack_from("<3I", data)
    colors = []
    for n in range(groups):
        *color, count = struct.unpack_from("<3fI", data, 12 + 16 * n)
        colors += [color] * count
    start = 12 + 16 * groups
    points = np.frombuffer(data, "<u2", 3 * vertices, start).reshape(-1, 3) / 65535 - 0.5
    corners = np.frombuffer(data, "<u2", 3 * faces, start + 6 * vertices).reshape(-1, 3)
    assert start + 6 * vertices + 6 * faces == len(data)
    return points, corners, np.array(colors)


def test_a_packed_mesh_keeps_positions_and_groups_faces_by_colour():
    ball = trimesh.creation.icosphere(subdivisions=2, radius=0.45)
    colors = np.where(ball.triangles_center[:, :1] < 0, RED[:3], BLUE[:3])
    points, corners, read = unpack(pack_mesh(ball.vertices, ball.faces, colors))
    np.testing.assert_allclose(points, ball.vertices, atol=1e-5)
    is_red = points[corners].mean(axis=1)[:, 0] < 0
    np.testing.assert_allclose(read, np.where(is_red[:, None], RED[:3], BLUE[:3]), atol=1e-6)
    assert len(corners) == len(ball.faces)
    assert np.isnan(unpack(pack_mesh(ball.vertices, ball.faces, None))[2]).all()


def test_faces_without_area_are_left_out():
    vertices = np.array([[0, 0, 0], [0.1, 0, 0], [0.2, 0, 0], [0, 0.1, 0]])
    faces = np.array([[0, 1, 2], [0, 1, 3]])
    assert unpack(pack_mesh(vertices, faces, None))[1].tolist() == [[0, 1, 3]]


def test_a_surface_is_simplified_to_the_number_of_faces():
    ball = trimesh.creation.icosphere(subdivisions=5, radius=0.45)
    vertices, faces = simplify(ball.vertices, ball.faces.astype(np.int32), 1000)
    assert 800 <= len(faces) <= 1100
    np.testing.assert_allclose(np.linalg.norm(vertices, axis=1), 0.45, atol=0.01)


def test_a_soup_of_triangles_is_reduced_to_twice_the_number_at_most():
    rng = np.random.default_rng(0)
    corners = rng.uniform(-0.4, 0.4, (20_000, 1, 3)) + rng.normal(scale=0.01, size=(20_000, 3, 3))
    faces = np.arange(60_000, dtype=np.int32).reshape(-1, 3)
    vertices, few = simplify(corners.reshape(-1, 3), faces, 500)
    assert 0 < len(few) <= 1000
    assert few.max() < len(vertices)


def test_the_colour_of_a_face_is_the_mean_of_its_texture_and_factor():
    """The left half of the texture is white, the right half black; the factor is a half."""
    texture = np.zeros((2, 4, 4), np.uint8)
    texture[:, :2], texture[..., 3] = 255, 255
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
    vertices = np.concatenate([corners, np.zeros((4, 1))], axis=1)
    material = Material(base_color=(0.5, 0.5, 0.5, 1.0), texture=texture)
    part = Part(vertices=slice(0, 4), faces=slice(0, 2), material=material, uv=0.5 * corners)
    faces = np.array([[0, 1, 2], [0, 2, 3]], np.int32)
    mesh = Mesh(vertices=vertices, faces=faces, parts=(part,))
    np.testing.assert_allclose(face_colors(mesh), 0.5, atol=1e-6)  # u below a half is white
    whole = replace(mesh, parts=(replace(part, uv=corners),))
    assert (np.abs(face_colors(whole).mean(axis=0) - 0.25) < 0.05).all()


def row(number, **options):
    return ManifestRow(**{"uid": f"folder-{number}", "status": "done", **options})


def test_finished_assets_have_most_of_the_meshes_and_lost_ones_a_quarter():
    rows = [row(n) for n in range(50)]
    rows += [row(50 + n, status="rejected", stage="geometry", reason="flat") for n in range(50)]
    rows += [row(100 + n, status="rejected", stage="load", reason="unreadable") for n in range(50)]
    chosen = choose_shown(rows, 20)
    assert [item.status for item in chosen] == ["done"] * 15 + ["rejected"] * 5
    assert {item.stage for item in chosen} == {"", "geometry"}
    assert len({item.uid for item in chosen}) == 20
    assert len(choose_shown(rows[:50], 20)) == 20
    assert len(choose_shown(rows, 1000)) == 100
    assert choose_shown(rows, 0) == []


@pytest.fixture
def build(tmp_path):
    folder = tmp_path / "assets"
    folder.mkdir()
    for number, name in enumerate(("a.ply", "b.ply", "c.ply", "d.ply")):
        trimesh.creation.box((1.0, 0.5, 0.2 + 0.1 * number)).export(folder / name)
    rows = make_build(tmp_path / "build", folder)
    (folder / "b.ply").write_bytes(b"other")
    rows[2] = replace(rows[2], status="rejected", stage="topology", reason="<script>", tokens={})
    return tmp_path / "build", rows


class DyingProcess:
    """Runs calls in this process. The first call ends when the second asset has started."""

    calls = 0

    def __init__(self, warm_up):
        pass

    def call(self, function, job, *, log, timeout_s, memory_bytes):
        from pipeline.inspection import report_meshes

        type(self).calls += 1
        first = type(self).calls == 1
        report_meshes.make_meshes(replace(job, assets=job.assets[:1]) if first else job)
        if first:
            (job.folder / job.assets[1].record.uid).mkdir()
            (job.folder / job.assets[1].record.uid / report_meshes.STARTED).touch()
        reason = "crashed_signal_11" if first else ""
        return ProcessExit(reason=reason, detail="", seconds=0.0, peak_rss_bytes=0)

    def close(self):
        pass


def listed(build, rows, **options):
    return asset_list(
        read_plan(build),
        rows,
        resolutions=[64],
        picture_resolution=None,
        cameras="paper",
        options=ReportConfig(directory=build, **options),
    )


def test_an_asset_whose_process_dies_costs_itself(build, monkeypatch):
    monkeypatch.setattr(report_assets, "IsolatedProcess", DyingProcess)
    out, rows = build
    page = listed(out, [rows[0], rows[3], rows[1], rows[2]])
    entries = {entry["uid"]: entry for entry in json.loads(page["assets_json"])}
    notes = [entries[row.uid]["notes"] for row in rows]
    assert notes[0] == {"original": 12}
    assert notes[1] == {"no_original": "changed"}
    assert notes[2] == {"original": 12}
    assert notes[3] == {"failed": "crashed_signal_11"}
    assert set(page["payloads"]) == {f"{rows[0].uid}/original", f"{rows[2].uid}/original"}
    # a reason cannot end the script that holds it
    assert "<script>" not in page["assets_json"]
    assert entries[rows[2].uid]["reason"] == "<script>"


def test_originals_can_be_left_out_and_a_long_list_is_cut(build, monkeypatch):
    monkeypatch.setattr(report_assets, "IsolatedProcess", DyingProcess)
    monkeypatch.setattr(DyingProcess, "calls", 1)
    out, rows = build
    monkeypatch.setattr(report_assets, "MAX_ROWS", 2)
    page = listed(out, rows, originals="none", meshes=2)
    assert page["payloads"] == {}
    assert "--originals none" in page["originals_note"]
    assert (page["listed_entries"], page["all_entries"]) == (2, 4)
