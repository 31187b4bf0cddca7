"""The benchmark of the SDF on a GPU, as far as it runs without one."""

from dataclasses import replace

import numpy as np
import pytest
import trimesh

from benchmarks import sdf_gpu
from pipeline.core.errors import UserError
from pipeline.geometry.config import TopologyConfig
from pipeline.geometry.sdf import compute_bricks
from pipeline.geometry.topology import build_topology
from tests.pipeline import known_shapes as geo

pytestmark = pytest.mark.filterwarnings(
    "ignore:(divide by zero|invalid value):RuntimeWarning"
)  # of padding


@pytest.fixture(scope="module")
def topology():
    return build_topology(geo.box((0.5, 0.3, 0.2)).mesh, TopologyConfig(resolution=64))


def test_packed_topologies_give_the_same_distances(tmp_path):
    trimesh.creation.box((1, 2, 3)).export(tmp_path / "box.ply")
    trimesh.creation.icosphere(subdivisions=2).export(tmp_path / "ball.stl")
    file = tmp_path / "out" / "packed.npz"
    args = f"topologies --meshes {tmp_path} --names box.ply --topology-resolution 64 --out {file}"
    sdf_gpu.main(args.split())
    with pytest.raises(UserError, match="is called nothing"):
        sdf_gpu.main(f"topologies --meshes {tmp_path} --names nothing --out {file}".split())
    (name, found), *others = sdf_gpu.read_topologies(file).items()
    assert (name, others, found.resolution) == ("box.ply", [], 64)
    mesh = geo.box(tuple(0.95 * np.array([1, 2, 3]) / 3)).mesh
    expected = compute_bricks(build_topology(mesh, TopologyConfig(resolution=64)), 64)
    bricks = compute_bricks(found, 64)
    np.testing.assert_array_equal(bricks.cells, expected.cells)
    np.testing.assert_allclose(
        bricks.values.astype(float), expected.values.astype(float), atol=1e-3
    )


def test_both_devices_are_timed(topology, monkeypatch):
    for name in ("NARROW_TILE", "DISTANCE_TILE", "VOTE_TILE"):
        monkeypatch.setattr(f"kernels.sdf.distances.{name}", 32)
    row = sdf_gpu.compare(topology, 16, repeats=1, device="cpu")
    assert (row["resolution"], row["blocks"], row["cells"]) == (16, 8, 8)
    assert min(row["cpu_s"], row["bins_s"], row["fill_s"]) > 0


def test_differences_are_counted(topology):
    bricks = compute_bricks(topology, 64)
    same = sdf_gpu.difference(bricks, bricks)
    assert same["values"] == bricks.values.size
    assert not any(
        same[name]
        for name in ("max_voxels", "differing", "wrong_signs", "other_cells", "other_sharp_bits")
    )
    values, sharp = bricks.values.copy(), bricks.sharp.copy()
    at = np.abs(bricks.values[3]).argmax()
    values[3, at] *= -1
    sharp[5, 7] ^= 0b101
    found = replace(bricks, cells=bricks.cells[1:], values=values[1:], sharp=sharp[1:])
    other = sdf_gpu.difference(found, bricks)
    assert (other["wrong_signs"], other["other_cells"], other["other_sharp_bits"]) == (1, 1, 2)
    tau_voxels = 2 * 63 / 64
    assert other["max_voxels"] == pytest.approx(2 * abs(float(bricks.values[3, at])) * tau_voxels)
    assert other["differing"] == 1 / (bricks.values.size - 512)
