"""The SDF benchmark on one small mesh, and its true distances."""

import json

import numpy as np
import pytest
import trimesh

from benchmarks import sdf_cost
from benchmarks.sdf import main
from benchmarks.sdf_cost import digest
from benchmarks.sdf_truth import closest_on_mesh, open_edges, sample_truth, winding
from pipeline.core.errors import UserError
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


def test_digests_tell_types_shapes_and_values_apart():
    values = np.arange(6, dtype=np.int32)
    others = [values.reshape(2, 3), values.astype(np.uint32), values[::-1], np.append(values, 0)]
    assert len({digest(array) for array in [values, *others]}) == 5
    assert digest(values) == digest(values.copy())


def test_one_run_measures_topology_and_bricks_of_a_file(tmp_path, capsys):
    ball().export(tmp_path / "ball.ply")
    sdf_cost.main(f"--meshes {tmp_path / 'ball.ply'} --resolution 64".split())
    (row,) = capsys.readouterr().out.splitlines()[2:]
    name, resolution, faces, pieces, topology, bricks, total, *digests = row.strip("| ").split(
        " | "
    )
    assert (name.strip(), int(resolution), int(faces)) == ("ball.ply", 64, 320)
    assert int(pieces) == 320
    assert abs(float(topology) + float(bricks) - float(total)) < 0.02
    assert all(len(text.strip()) == 16 for text in digests)


def test_a_file_that_does_not_exist_ends_the_command_by_name(tmp_path):
    with pytest.raises(UserError, match=r"must be files, got .*lost\.ply"):
        sdf_cost.main(["--meshes", str(tmp_path / "lost.ply")])
