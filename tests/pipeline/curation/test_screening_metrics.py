"""Screening metrics of shapes whose measurements are known."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.core.grid import check_resolution
from pipeline.core.schema import Mesh
from pipeline.curation.config import DedupConfig, ScreenConfig
from pipeline.curation.screening_metrics import (
    METRICS_SCHEMA,
    METRICS_SCHEMA_1,
    bounding_box_grid_points,
    compute_metrics,
    enclosed_grid_points,
    load_metrics,
    read_metrics_table,
    save_metrics,
    write_metrics_table,
)
from pipeline.geometry.config import TopologyConfig
from pipeline.geometry.topology import build_topology
from pipeline.mesh_io.config import NormalizeConfig
from pipeline.mesh_io.normalize import normalize
from pipeline.sources.shapes import closed_solids, pieces, primitives

SMALL = ScreenConfig(resolution=64, image_size=64)


def mesh_of(*solids):
    whole = pieces.joined(list(solids))
    return normalize(
        Mesh(vertices=whole.vertices, faces=whole.faces.astype(np.int32)), NormalizeConfig()
    )


def measured(mesh, resolution=128):
    return compute_metrics(mesh, build_topology(mesh, TopologyConfig(resolution=resolution)), SMALL)


def difference(a, b, name="visible_moments"):
    """Return the largest difference between the moments of two shapes."""
    moments = [np.frombuffer(getattr(row, name), np.float32) for row in (a, b)]
    return float(np.abs(moments[0] - moments[1]).max())


def without(mesh, chosen):
    return Mesh(vertices=mesh.vertices, faces=mesh.faces[~chosen])


def cracked_box(gap):
    """A box whose top is separated by a gap in its plane, so there is no boundary loop to close."""
    box = mesh_of(closed_solids.box(1, 1, 1))
    top = (box.vertices[box.faces][:, :, 1] > 0.47).all(axis=1)
    vertices = box.vertices[box.faces].copy()
    vertices[top] *= np.array([1 - gap / 0.475, 1, 1 - gap / 0.475])
    return Mesh(
        vertices=vertices.reshape(-1, 3),
        faces=np.arange(3 * len(vertices), dtype=np.int32).reshape(-1, 3),
    )


@pytest.mark.parametrize(
    ("piece", "fraction"),
    [(closed_solids.box(1, 2, 1), 1.0), (closed_solids.sphere(1.0), np.pi / 6)],
)
def test_solid_fraction(piece, fraction):
    assert measured(mesh_of(piece)).solid_fraction == pytest.approx(fraction, abs=0.02)


def test_a_sheet_encloses_nothing():
    u = np.linspace(-1, 1, 20)
    x, y = np.meshgrid(u, u, indexing="ij")
    row = measured(mesh_of(primitives.surface(np.stack([x, y, 0.2 * np.sin(3 * x)], axis=-1))))
    assert (row.solid_fraction, row.leak_fraction, row.sheet_share) == (0.0, 0.0, 1.0)


def test_closed_shapes_do_not_leak():
    assert measured(mesh_of(closed_solids.box(1, 1, 1))).leak_fraction < 0.01
    assert measured(mesh_of(closed_solids.torus(1.0, 0.3))).leak_fraction < 0.01


def test_a_crack_that_only_the_thicker_barrier_closes_is_a_leak(monkeypatch):
    """The flood passes cracks wider than 1.2 voxels. The thicker barrier stops it up to 2.4."""
    monkeypatch.setattr(
        "pipeline.geometry.topology.holes.boundary_loops", lambda faces: []
    )  # leave cracks to the flood
    tight, leaky = (measured(cracked_box(voxels / 127)) for voxels in (0.5, 1.8))
    assert tight.solid_fraction == pytest.approx(1.0, abs=0.03)
    assert tight.leak_fraction < 0.01
    assert leaky.solid_fraction < 0.1
    assert leaky.leak_fraction > 0.8


def test_signatures_do_not_depend_on_order_winding_or_repetition_of_faces():
    knot = mesh_of(closed_solids.torus(1.0, 0.3, 40, 20))
    draw = np.random.default_rng(0)
    faces = np.concatenate([knot.faces, knot.faces[:50]])[draw.permutation(len(knot.faces) + 50)]
    faces[::2] = faces[::2, ::-1]
    shuffled = Mesh(vertices=knot.vertices, faces=faces)
    a, b = measured(knot), measured(shuffled)
    assert difference(a, b) < 1e-5
    assert (a.tokens, a.visible_area) == (b.tokens, pytest.approx(b.visible_area, rel=1e-6))


def test_signatures_tolerate_rounding_and_distinguish_shapes():
    knot = mesh_of(closed_solids.torus(1.0, 0.3, 40, 20))
    vertices = (knot.vertices * 37 + 5).astype(np.float32).astype(np.float64)
    rounded = normalize(Mesh(vertices=vertices, faces=knot.faces), NormalizeConfig())
    other = mesh_of(closed_solids.torus(1.0, 0.4, 40, 20))
    a, b, c = measured(knot), measured(rounded), measured(other)
    assert difference(a, b) < DedupConfig().shape_tolerance / 5
    assert difference(a, c) > 100 * DedupConfig().shape_tolerance


def test_a_copy_with_other_hidden_faces_has_the_same_visible_moments():
    shell, core = closed_solids.sphere(1.0), closed_solids.box(0.3, 0.5, 0.4)
    empty, filled = measured(mesh_of(shell)), measured(mesh_of(shell, core))
    assert difference(empty, filled) < 1e-6
    assert difference(empty, filled, "face_moments") > 1e-2


def test_metrics_survive_writing_and_reading(tmp_path):
    row = measured(mesh_of(closed_solids.box(1, 2, 3)), 64)
    save_metrics(tmp_path, row)
    assert load_metrics(tmp_path) == row
    write_metrics_table(tmp_path / "a.parquet", [("u", row)])
    write_metrics_table(tmp_path / "b.parquet", [("u", load_metrics(tmp_path))])
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    table = read_metrics_table(tmp_path / "a.parquet")
    assert table.column_names == METRICS_SCHEMA.names
    assert table["visible_moments"][0].as_py() == row.visible_moments
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="readable"):
        read_metrics_table(tmp_path / "c.parquet")


def test_tables_of_the_first_version_can_be_read(tmp_path):
    table = METRICS_SCHEMA_1.empty_table()
    pq.write_table(table, tmp_path / "old.parquet")
    assert read_metrics_table(tmp_path / "old.parquet").column_names == METRICS_SCHEMA_1.names
    assert METRICS_SCHEMA_1.names == [
        *("uid", "tokens", "solid_fraction", "leak_fraction", "sheet_share", "visible_area"),
        *("coverage_mean", "coverage_min", "brightness_mean", "contrast_mean", "white_max"),
        *("textured", "colored", "occupancy", "looks"),
    ]


def test_a_resolution_below_64_is_refused():
    assert check_resolution(ScreenConfig().resolution) == 256
    with pytest.raises(ValueError, match="at least 64, got 32"):
        ScreenConfig(resolution=32)


def test_bounding_box_grid_points_of_a_box():
    mesh = mesh_of(closed_solids.box(2, 1, 1))
    assert bounding_box_grid_points(mesh, 128) == pytest.approx((0.95 * 127) ** 3 / 4)
    flood = build_topology(mesh, TopologyConfig(resolution=128)).flood
    assert enclosed_grid_points(flood) == pytest.approx(
        bounding_box_grid_points(mesh, 128), rel=0.05
    )
