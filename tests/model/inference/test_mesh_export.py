"""Mesh files are read back by another library, and previews show the mesh."""

import numpy as np
import pytest
import trimesh
from PIL import Image

from model.inference.turntable import turntable, write_preview
from pipeline.mesh_io.mesh_export import FORMATS, write_mesh

BOX = trimesh.creation.box([0.5, 0.3, 0.2])
VERTICES, FACES = np.asarray(BOX.vertices), np.asarray(BOX.faces, np.int32)


@pytest.mark.parametrize("ending", [*FORMATS, ".GLB"])
def test_written_meshes_are_read_back(ending, tmp_path):
    path = tmp_path / "new" / f"box{ending}"
    write_mesh(path, VERTICES, FACES)
    mesh = trimesh.load(path, force="mesh")
    # Equal triangles mean equal order, winding, scale and axes.
    np.testing.assert_allclose(mesh.triangles, VERTICES[FACES], atol=1e-7)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    first = path.read_bytes()
    write_mesh(path, VERTICES, FACES)
    assert path.read_bytes() == first


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.glb, \.obj, \.ply, \.stl, got \.fbx"):
        write_mesh(tmp_path / "box.fbx", VERTICES, FACES)
    with pytest.raises(ValueError, match=r"\.gif or \.png, got \.jpg"):
        write_preview(tmp_path / "box.jpg", VERTICES, FACES)


def test_a_turntable_shows_the_mesh_from_all_sides():
    front, side = turntable(VERTICES, FACES, 4, size=96)[:2]
    widths = [(view != view[0, 0]).any(axis=2).any(axis=0).sum() for view in (front, side)]
    a, b = np.radians(30), np.radians(120)
    expected = [0.5 * abs(np.cos(t)) + 0.2 * abs(np.sin(t)) for t in (a, b)]  # of the box's shadow
    assert widths[0] / widths[1] == pytest.approx(expected[0] / expected[1], rel=0.15)


def test_previews_are_written_as_png_and_gif(tmp_path):
    write_preview(tmp_path / "box.png", VERTICES, FACES, size=48)
    assert Image.open(tmp_path / "box.png").size == (4 * 48, 2 * 48)
    write_preview(tmp_path / "box.gif", VERTICES, FACES, size=48)
    with Image.open(tmp_path / "box.gif") as image:
        assert (image.n_frames, image.info["loop"]) == (36, 0)
