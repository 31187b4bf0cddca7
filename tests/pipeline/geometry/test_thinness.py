"""Closed parts thinner than a voxel are counted."""

import numpy as np
import pytest
import trimesh

from pipeline.core.grid import spacing
from pipeline.core.schema import Mesh
from pipeline.geometry.config import TopologyConfig
from pipeline.geometry.sdf import compute_bricks
from pipeline.geometry.thinness import thin_share
from pipeline.geometry.topology import build_topology
from tests.pipeline.known_shapes import as_mesh

H = spacing(64)


def boxes(*bounds):
    """Return the mesh of boxes, each ((x, y, z), (x, y, z)): lowest and highest corner."""
    return as_mesh(*(trimesh.creation.box(bounds=ends) for ends in bounds))


def share_of(mesh, resolution=64):
    topology = build_topology(mesh, TopologyConfig(resolution=128))
    return thin_share(topology, compute_bricks(topology, resolution))


def test_a_thick_box_leaves_sign_changes_everywhere():
    assert share_of(boxes(((-0.3, -0.3, -0.3), (0.31, 0.32, 0.33)))) == 0


@pytest.mark.parametrize(("low", "expected"), [(0.2, 1.0), (0.8, 0.0)])
def test_a_closed_plate_of_half_a_voxel_counts_if_it_lies_between_the_grid_points(low, expected):
    # grid points along y at multiples of H from -0.5; the plate begins `low` voxels above one
    bottom = -0.5 + (32 + low) * H
    plate = boxes(((-0.4, bottom, -0.4), (0.4, bottom + 0.5 * H, 0.4)))
    assert share_of(plate) == pytest.approx(expected, abs=0.01)


def test_the_share_is_one_of_the_visible_area():
    bottom = -0.5 + 40.2 * H
    plate = ((-0.4, bottom, -0.4), (0.4, bottom + 0.5 * H, 0.4))
    block = ((-0.4, -0.45, -0.4), (0.4, -0.25, 0.4))
    thin = 2 * 0.8**2 + 4 * 0.8 * 0.5 * H
    thick = 2 * 0.8**2 + 4 * 0.8 * 0.2
    assert share_of(boxes(plate, block)) == pytest.approx(thin / (thin + thick), abs=0.005)
    assert share_of(boxes(plate, block), resolution=256) == 0


def test_an_open_sheet_has_a_thickness_and_does_not_count():
    square = np.array([[-0.4, 0.01, -0.4], [0.4, 0.01, -0.4], [0.4, 0.01, 0.4], [-0.4, 0.01, 0.4]])
    mesh = Mesh(vertices=square, faces=np.array([[0, 1, 2], [0, 2, 3]], np.int32))
    assert share_of(mesh) == 0
