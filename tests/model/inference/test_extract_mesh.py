"""Meshes of decoded bricks against analytic surfaces."""

import numpy as np
import pytest
import torch

from model.inference.extract_mesh import extract_mesh, extract_meshes
from model.sparse_tensor import BrickBatch, Level
from pipeline.core.grid import band, spacing
from pipeline.core.schema import Bricks
from tests.child_python import run_python


def analytic_bricks(distance, resolution, reach=1.0):
    """Return bricks of the cells with a grid point closer to the surface than reach * tau.

    `distance` maps points [N, 3] in the cube to distances [N].
    """
    side, tau, h = resolution // 8, band(resolution), spacing(resolution)
    cells = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)
    centre = (8 * cells + 3.5) * h - 0.5
    cells = cells[np.abs(distance(centre)) < reach * tau + 3.5 * np.sqrt(3) * h]
    local = np.stack(np.meshgrid(*[np.arange(8)] * 3, indexing="ij"), -1).reshape(-1, 3)
    blocks, values = [], []
    for chunk in np.array_split(cells, max(1, len(cells) // 4096)):
        d = distance(((8 * chunk[:, None] + local) * h - 0.5).reshape(-1, 3)).reshape(-1, 512)
        near = (np.abs(d) < reach * tau).any(1)
        blocks.append(chunk[near])
        values.append(np.clip(d[near] / tau, -1, 1).astype(np.float16))
    blocks, values = np.concatenate(blocks), np.concatenate(values)
    sharp = np.zeros((len(blocks), 64), np.uint8)
    return Bricks(resolution=resolution, cells=blocks.astype(np.int16), values=values, sharp=sharp)


def sphere(radius, centre=(0.0, 0.0, 0.0)):
    return lambda p: np.linalg.norm(p - np.array(centre), axis=1) - radius


def torus(p, major=0.3, minor=0.12):
    return np.hypot(np.hypot(p[:, 0], p[:, 2]) - major, p[:, 1]) - minor


def volume(vertices, faces):
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    return (np.cross(a, b) * c).sum() / 6


def euler(vertices, faces):
    low, high = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2).astype(np.int64), 1).T
    return len(vertices) - len(np.unique(low * len(vertices) + high)) + len(faces)


def test_surfaces_of_a_batch_match_the_analytic_ones():
    assets = [sphere(0.3), None, torus, sphere(0.2, (0.1, 0.05, -0.1))]
    bricks = [analytic_bricks(d or (lambda p: np.full(len(p), 1.0)), 64) for d in assets]
    batch = BrickBatch.collate(bricks)
    meshes = extract_meshes(batch.cells, batch.values)
    assert len(meshes) == 4
    assert len(meshes[1][0]) == len(meshes[1][1]) == 0
    for distance, number, volume_exact in zip(
        assets,
        (2, None, 0, 2),
        (4 / 3 * np.pi * 0.3**3, None, 2 * np.pi**2 * 0.3 * 0.12**2, 4 / 3 * np.pi * 0.2**3),
    ):
        if distance is None:
            continue
        vertices, faces = meshes[assets.index(distance)]
        assert np.abs(distance(vertices)).max() < 0.1 * spacing(64)
        assert euler(vertices, faces) == number
        # A positive volume means that faces are counterclockwise seen from outside.
        assert volume(vertices, faces) == pytest.approx(volume_exact, rel=0.02)


def test_the_iso_value_moves_the_surface():
    one = analytic_bricks(sphere(0.3), 64)
    vertices, _ = extract_mesh(one.cells, one.values.astype(np.float32), 64, iso_value=0.5)
    batch = BrickBatch.collate([one])
    ((same, _),) = extract_meshes(batch.cells, batch.values, iso_value=0.5)
    assert len(same) == len(vertices)
    assert same.sum() == pytest.approx(vertices.sum())
    assert np.abs(sphere(0.3 + 0.5 * band(64))(vertices)).max() < 0.1 * spacing(64)


def test_there_is_no_surface_outside_the_decoded_cells():
    one = analytic_bricks(sphere(0.3), 64)
    keep = one.cells[:, 0] < 4
    vertices, faces = extract_mesh(one.cells[keep], one.values[keep], 64)
    assert len(faces)
    last_decoded_plane = 31 * spacing(64) - 0.5
    assert vertices[:, 0].max() <= last_decoded_plane + 1e-9
    assert np.abs(sphere(0.3)(vertices)).max() < 0.1 * spacing(64)


def test_untrained_values_have_no_surface():
    level = Level.from_coords(torch.tensor([[0, 1, 2, 3]], dtype=torch.int32), 8, 2)
    for vertices, faces in extract_meshes(level, torch.zeros(1, 512)):
        assert vertices.shape == faces.shape == (0, 3)


@pytest.mark.parametrize(
    ("blocks", "values", "message"),
    [
        (
            np.zeros((2, 2), int),
            np.zeros((2, 512)),
            r"cells_M3 must be integer \[M, 3\], got int64 \[2, 2\]",
        ),
        (np.zeros((1, 3)), np.zeros((1, 512)), "cells_M3 must be integer"),
        (np.zeros((1, 3), int), np.zeros((1, 64)), r"values_MK must be \[1, 512\], got \[1, 64\]"),
        (np.full((1, 3), 8), np.zeros((1, 512)), r"cells_M3 must be in 0..7, got 8..8"),
        (np.full((1, 3), -1), np.zeros((1, 512)), r"cells_M3 must be in 0..7, got -1..-1"),
        (np.zeros((2, 3), int), np.zeros((2, 512)), "cells_M3 must not repeat a cell"),
        (
            np.zeros((1, 3), int),
            np.full((1, 512), np.nan),
            "values_MK must be finite, got 512 that are not",
        ),
    ],
)
def test_invalid_arguments_are_refused(blocks, values, message):
    with pytest.raises(ValueError, match=message):
        extract_mesh(blocks, values, 64)


_CHILD = """
import resource, sys, time
import numpy as np, torch
from model.inference.extract_mesh import extract_meshes
from model.sparse_tensor import Level
from kernels import token_order
coords, values = (torch.from_numpy(np.load(name)) for name in sys.argv[1:3])
order = token_order(coords)
cells, values = Level.from_coords(coords[order], 128, 1), values[order]
one_cell = Level.from_coords(torch.zeros(1, 4).int(), 128, 1)
extract_meshes(one_cell, torch.linspace(-1, 1, 512)[None])  # compiles
base, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, time.process_time()
(vertices, faces), = extract_meshes(cells, values)
seconds = time.process_time() - start
np.save(sys.argv[3], vertices), np.save(sys.argv[4], faces)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
print(len(cells), len(vertices), len(faces), seconds, base, peak)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("distance", "number", "cells"),
    [(lambda p: torus(p, 0.28, 0.1115), 0, 45_900), (sphere(0.443), 2, 92_000)],
    ids=["torus", "sphere"],
)
def test_resolution_1024_takes_seconds_and_less_than_4_gb(tmp_path, distance, number, cells):
    one = analytic_bricks(distance, 1024)
    assert abs(len(one.cells) - cells) < 0.05 * cells
    files = [tmp_path / f"{name}.npy" for name in ("coords", "values", "vertices", "faces")]
    np.save(files[0], np.pad(one.cells.astype(np.int32), ((0, 0), (1, 0))))
    np.save(files[1], one.values)
    child = run_python("-c", _CHILD, *files)
    cells, count, _, seconds, base, peak = map(float, child.stdout.split())
    vertices, faces = np.load(files[2]), np.load(files[3])
    assert len(vertices) == count
    assert np.abs(distance(vertices)).max() < 0.05 * spacing(1024)
    assert euler(vertices, faces) == number
    assert peak < 4096, (
        f"{cells:.0f} cells: {seconds:.2f} CPU-s, {peak:.0f} MB, of which {base:.0f} before"
    )
    assert seconds < 20
