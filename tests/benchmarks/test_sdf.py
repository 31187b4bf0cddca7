"""The SDF benchmark on one small mesh, and its true distances."""

import json

import numpy as np
import trimesh

from benchmarks.sdf import main
from benchmarks.sdf_truth import closest_on_mesh, open_edges, sample_truth, winding
from pipeline.core.grid import band, spacing
from pipeline.core.schema import Mesh


def ball(subdivisions=2):
    return trimesh.creation.icosphere(subdivisions=subdivisions, radius=0.475)


def test_one_run_measures_cost_error_and_size(tmp_path, capsys):
    ball().export(tmp_path / "ball.ply")
    out = tmp_path / "sdf.json"
    main(
        f"--meshes {tmp_path} --resolutions 64 --full-resolutions 64 72 --topology-resolution 64 "
        f"--peers --samples 2000 --out {out}".split()
    )
    results = json.loads(out.read_text(encoding="utf-8"))
    (ours,) = results["rows"]
    assert (ours["mesh"], ours["faces"], ours["method"], ours["resolution"]) == (
        "ball.ply",
        320,
        "ours",
        64,
    )
    assert ours["cpu_s"] > 0
    assert ours["peak_mb"] > ours["base_mb"] > 10
    assert ours["points"] > 1500
    assert (ours["missing"], ours["wrong_sign"]) == (0, 0)
    assert abs(ours["offset_voxels"]) <= ours["error_voxels"] < 0.02
    (full,) = results["full"]
    assert set(full["parts_s"]) == {"topology", "sdf_64", "sdf_72"}
    assert full["stored"]["64"]["cells"] == ours["cells"]
    assert 50 < full["stored"]["64"]["bytes"] / ours["cells"] < 1200
    assert str(tmp_path) not in out.read_text(encoding="utf-8")
    assert "| ball.ply" in capsys.readouterr().out


def test_the_truth_is_right_for_a_sphere_and_leaves_an_opening_out():
    shape = ball(4)
    faces = np.asarray(shape.faces, np.int32)
    closed = Mesh(vertices=np.asarray(shape.vertices), faces=faces)
    truth = sample_truth(closed, 64, 2000)
    radius = np.linalg.norm(truth.points * spacing(64) - 0.5, axis=1)
    sag_voxels = 0.475 * 0.002 / spacing(64)
    assert np.abs(truth.voxels - (radius - 0.475) / spacing(64)).max() < sag_voxels
    assert len(truth.points) == truth.sampled
    assert not len(open_edges(closed))

    opened = Mesh(vertices=closed.vertices, faces=faces[shape.triangles_center[:, 1] > -0.4])
    truth = sample_truth(opened, 64, 2000)
    assert 0.5 * truth.sampled < len(truth.points) < truth.sampled
    rim = open_edges(opened)
    assert closest_on_mesh(truth.points * spacing(64) - 0.5, rim[:, [0, 1, 1]])[
        0
    ].min() > 1.5 * band(64)
    assert 0.9 < winding(np.zeros((1, 3)), opened.vertices[opened.faces])[0] < 1


def test_the_truth_leaves_open_sheets_out():
    corners = np.array([[-0.4, 0, -0.4], [0.4, 0, -0.4], [0.4, 0.1, 0.4], [-0.4, 0.2, 0.4]])
    mesh = Mesh(vertices=corners, faces=np.array([[0, 1, 2], [0, 2, 3]], np.int32))
    truth = sample_truth(mesh, 256, 1000)
    assert truth.sampled > 500
    assert len(truth.points) == 0
