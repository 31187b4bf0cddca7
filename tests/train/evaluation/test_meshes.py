"""Comparison of mesh files: normals, edges and distances that are known."""

import json

import numpy as np
import pytest
import trimesh

from pipeline.core.errors import RunError, UserError
from train.evaluate import main
from train.evaluation import meshes
from train.evaluation.config import MeshEvaluation
from train.evaluation.meshes import VIEWS, cameras, compare_meshes, evaluate_meshes, sharp_pixels


def box(*sides, move=(0, 0, 0)):
    mesh = trimesh.creation.box(sides)
    return mesh.vertices + np.array(move), mesh.faces


def compare(surface, reference):
    return compare_meshes("a", surface, reference, size=96, samples=4000)


def test_the_cameras_look_from_all_sides():
    directions = np.array([camera.c2w[:3, 3] for camera in cameras()])
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    assert len(directions) == VIEWS
    assert np.linalg.norm(directions.mean(axis=0)) < 0.05
    near = directions @ directions.T - 2 * np.eye(VIEWS)
    assert near.max() < np.cos(np.radians(30))  # no two are closer than 30 degrees


def test_a_mesh_has_no_distance_to_itself():
    result = compare(box(1, 0.6, 0.4), box(1, 0.6, 0.4))
    assert result.normal_mse == result.sharp_normal_error == 0
    assert result.chamfer < 1e-20
    assert result.f1 == 1


def test_the_frame_is_that_of_the_reference():
    # A shift by 1% of the longest side is 0.019 in the frame [-1, 1]^3.
    for scale in (1, 30):
        moved = box(scale, scale, scale, move=(0.01 * scale, 0, 0))
        result = compare(moved, box(scale, scale, scale))
        # The two faces across x are 0.019 away: a third of both surfaces' points. Points of the
        # other four are at most 0.019 beyond an edge.
        assert pytest.approx(result.chamfer, rel=0.1) == 2 * 0.019**2 / 3
        assert result.f1 == pytest.approx(2 / 3, abs=0.05)


def test_turned_normals_have_the_error_of_their_angle(monkeypatch):
    # Only the camera in front sees the square, and its silhouette is kept by shearing.
    front = [camera for camera in cameras() if camera.c2w[2, 3] > 0][:1]
    monkeypatch.setattr(meshes, "cameras", lambda: front)
    direction = front[0].c2w[:3, 2]
    square = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], float) / 2
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    right, up = front[0].c2w[:3, 0], front[0].c2w[:3, 1]

    def tilted(degrees):
        slope = np.tan(np.radians(degrees))
        plane = square[:, :1] * right + square[:, 1:2] * up
        return 0.6 * (plane + 0.02 * slope * square[:, :1] * direction), faces

    # Small depths barely move the silhouette; the tilt is measured by tan(angle) * 0.02.
    angle = np.arctan(0.02 * np.tan(np.radians(85)))
    surface, reference = tilted(85), tilted(0)
    mse, _ = meshes.normal_errors(surface, reference, 128)
    assert mse == pytest.approx(2 - 2 * np.cos(angle), rel=0.2)
    assert meshes.normal_errors((np.zeros((0, 3)), faces[:0]), reference, 128)[0] == pytest.approx(
        1
    )
    opposite = reference[0], faces[:, ::-1]
    # Both sides of a face look the same.
    assert meshes.normal_errors(opposite, reference, 128)[0] == pytest.approx(0)


def test_sharp_pixels_lie_at_edges_of_the_normals():
    normals = np.zeros((40, 40, 3))
    normals[:, :20], normals[:, 20:] = [0, 0, 1], [1, 0, 0]
    sharp = sharp_pixels(normals)
    assert sharp[10:30, 19:21].all()
    assert not sharp[:, :15].any()
    assert not sharp[:, 25:].any()
    assert not sharp_pixels(np.full((40, 40, 3), 0.5)).any()


def test_a_rounded_edge_has_a_larger_error_at_sharp_pixels():
    ball = trimesh.creation.icosphere(3, radius=0.6)
    rounded = np.clip(ball.vertices, -0.5, 0.5), ball.faces
    result = compare(rounded, box(1, 1, 1))
    assert result.sharp_normal_error > 1.5 * result.normal_mse > 0


def test_files_of_one_name_are_compared(tmp_path, caplog):
    pred, reference = tmp_path / "pred", tmp_path / "reference"
    for folder in (pred, reference):
        folder.mkdir()
    trimesh.creation.box((1, 1, 1)).export(pred / "a.ply")
    trimesh.creation.box((1, 1, 1)).export(reference / "a.obj")
    trimesh.creation.box((1, 2, 1)).export(reference / "b.obj")
    (pred / "notes.txt").touch()
    options = {"size": 32, "samples": 500}
    result = evaluate_meshes(
        MeshEvaluation(pred=pred, reference=reference, out=tmp_path / "out", **options)
    )
    (row,) = result["rows"]
    assert (row["name"], row["normal_mse"], row["f1"]) == ("a", 0, 1)
    assert "1 of 2 references have no mesh" in caplog.text
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert written["rows"] == result["rows"]
    words = ["meshes", "--pred", str(pred), "--reference", str(reference)]
    trimesh.creation.box((1, 1, 1)).export(pred / "a.stl")
    with pytest.raises(UserError, match=r"a\.ply and .*a\.stl have one name"):
        main(words)
    (pred / "a.ply").unlink()
    (pred / "a.stl").write_bytes(b"solid nothing")
    with pytest.raises(RunError, match="none of the meshes"):
        main(words)
    (pred / "a.stl").unlink()
    with pytest.raises(UserError, match="has the name of one in"):
        main(words)
