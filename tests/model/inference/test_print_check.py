"""The print check: openings, pieces, thin walls and overhangs of shapes that are known."""

import numpy as np
import pytest
import trimesh

from model.config import PrintOptions
from model.inference.print_check import check_print, wall_thickness

pytest.importorskip("embreex", reason="the library for rays is not installed")


def check(mesh, **options):
    return check_print(
        np.asarray(mesh.vertices), np.asarray(mesh.faces, np.int32), PrintOptions(**options)
    )


def test_a_standing_box_can_be_printed():
    result = check(trimesh.creation.box((1, 2, 1)))
    assert result.problems == []
    assert (result.open_edges, result.pieces, result.overhang_share) == (0, 1, 0.0)
    assert str(result) == (
        "print check at 100 mm: closed, one piece, thick enough, no steep overhang"
    )


def test_walls_are_measured_in_the_size_of_the_print():
    plate = trimesh.creation.box((1, 1, 0.02))
    thickness = wall_thickness(np.asarray(plate.vertices), np.asarray(plate.faces, np.int32))
    assert np.quantile(thickness, 0.5) == pytest.approx(0.02, rel=1e-3)
    thin = check(plate, size_mm=40, min_wall_mm=1)
    assert thin.thinnest_mm == pytest.approx(0.8, rel=1e-3)
    assert thin.thin_share == pytest.approx(2 / 2.08, abs=0.01)
    assert "% of the surface has walls below 1 mm, the thinnest about 0.80 mm" in str(thin)
    assert check(plate, size_mm=60, min_wall_mm=1).problems == []


def test_open_and_separate_surfaces_are_reported():
    box = trimesh.creation.box()
    both = trimesh.util.concatenate([box, box.copy().apply_translation((2, 0, 0))])
    assert check(both).problems == ["it has 2 separate pieces"]
    open_box = trimesh.Trimesh(box.vertices, box.faces[:-1], process=False)
    assert check(open_box).problems[0] == "the surface is not closed, it has 3 open edges"


@pytest.mark.parametrize(("half_angle", "overhangs"), [(40, False), (50, True)])
def test_a_cone_on_its_tip_overhangs_by_its_angle(half_angle, overhangs):
    cone = trimesh.creation.cone(np.tan(np.radians(half_angle)), 1, sections=128)
    cone.apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, (1, 0, 0)))
    assert cone.bounds[0, 1] == pytest.approx(-1)  # the tip points down
    assert (check(cone).overhang_share > 0) == overhangs


def test_limits_out_of_range_are_refused():
    with pytest.raises(ValueError, match="size_mm must be positive and finite, got 0"):
        PrintOptions(size_mm=0)
    with pytest.raises(ValueError, match="max_overhang_degrees must be from 0 to 90, got 91"):
        PrintOptions(max_overhang_degrees=91)
