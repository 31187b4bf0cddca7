"""Signed distances of the kernels, compared with the CPU reference and with brute force."""

import re

import numpy as np
import pytest
import torch

from kernels.sdf import distances as kernel
from pipeline.core.grid import CELL_SIDE, band, spacing
from pipeline.core.primitives.triangles import TIE, VOTE_ROUNDING, pack
from pipeline.core.schema import Mesh
from pipeline.geometry import sdf
from pipeline.geometry.config import TopologyConfig
from pipeline.geometry.flood_fill import bin_triangles
from pipeline.geometry.topology import BURIED, SHEET, SOLID, build_topology
from tests.kernel_inputs import DEVICE
from tests.kernels.compiled_launches import compiled_launches

LIMIT = 1e-3  # voxels
# padding divides by zero on purpose
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")


def sphere(subdivisions=2, radius=0.4, centre=(0.013, -0.004, 0.007)):
    """Return a subdivided octahedron, whose faces tie on the planes of symmetry."""
    vertices = np.concatenate([np.eye(3), -np.eye(3)])
    faces = np.array(
        [[0, 1, 2], [1, 3, 2], [3, 4, 2], [4, 0, 2], [1, 0, 5], [3, 1, 5], [4, 3, 5], [0, 4, 5]]
    )
    for _ in range(subdivisions):
        a, b, c = (vertices[faces[:, k]] for k in range(3))
        corners = np.stack([a, b, c, (a + b) / 2, (b + c) / 2, (c + a) / 2], 1).reshape(-1, 3)
        first = 6 * np.arange(len(faces))[:, None]
        faces = np.concatenate([first + k for k in ([0, 3, 5], [3, 1, 4], [5, 4, 2], [3, 4, 5])])
        vertices, where = np.unique(corners.round(12), axis=0, return_inverse=True)
        vertices, faces = (
            vertices / np.linalg.norm(vertices, axis=1, keepdims=True),
            where.reshape(-1)[faces],
        )
    return Mesh(vertices=vertices * radius + np.array(centre), faces=faces.astype(np.int32))


def box(extents=(0.8, 0.5, 0.37), centre=(0.013, -0.004, 0.007), open_top=False):
    corners = np.stack(np.meshgrid(*[[-0.5, 0.5]] * 3, indexing="ij"), axis=-1).reshape(8, 3)
    quads = np.array(
        [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    )
    quads = quads[: 6 - open_top]
    faces = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]]).astype(np.int32)
    return Mesh(vertices=corners * extents + np.array(centre), faces=faces)


def joined(*meshes):
    starts = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes)])
    return Mesh(
        vertices=np.concatenate([mesh.vertices for mesh in meshes]),
        faces=np.concatenate([mesh.faces + start for mesh, start in zip(meshes, starts)]).astype(
            np.int32
        ),
    )


def sheet():
    u, v = np.meshgrid(np.linspace(-0.4, 0.4, 9), np.linspace(-0.3, 0.3, 9), indexing="ij")
    vertices = np.stack([u, 0.08 * np.sin(9 * u) * np.cos(7 * v), v], axis=-1).reshape(-1, 3)
    i, j = np.meshgrid(np.arange(8), np.arange(8), indexing="ij")
    corner = (9 * i + j).reshape(-1)
    faces = [
        np.stack([corner, corner + 1, corner + 10], 1),
        np.stack([corner, corner + 10, corner + 9], 1),
    ]
    return Mesh(vertices=vertices, faces=np.concatenate(faces).astype(np.int32))


def mesh_of_corners(corners):
    corners = np.asarray(corners, np.float64)
    return Mesh(
        vertices=corners.reshape(-1, 3),
        faces=np.arange(3 * len(corners), dtype=np.int32).reshape(-1, 3),
    )


def soup(seed, count=30):
    """Return random triangles of all sizes. Every third is a needle."""
    random = np.random.default_rng(seed)
    size = 10 ** random.uniform(-2, 0, (count, 1, 1))
    corners = (
        random.uniform(-0.25, 0.25, (count, 1, 3))
        + random.uniform(-0.22, 0.22, (count, 3, 3)) * size
    )
    along = random.uniform(0, 1, (count, 1))[::3]
    corners[::3, 2] = (
        (1 - along) * corners[::3, 0]
        + along * corners[::3, 1]
        + random.normal(size=(len(along), 3)) * 1e-7
    )
    return mesh_of_corners(corners)


def fans(seed, count=8):
    """Return groups of three triangles with a common corner, where the angles decide the side."""
    random = np.random.default_rng(seed)
    corners = random.uniform(-0.3, 0.3, (count, 1, 1, 3)) + random.uniform(
        -0.15, 0.15, (count, 3, 3, 3)
    )
    for k in range(3):
        corners[:, k, random.integers(3)] = corners[:, 0, 0]
    return mesh_of_corners(corners.reshape(-1, 3, 3))


MESHES = {
    "sphere": sphere(),
    "box": box(),
    "sheet": sheet(),
    "overlap": joined(
        box(), box((0.3, 0.8, 0.21), (0.05, 0.02, -0.03)), sphere(1, 0.2, (0.2, 0.2, 0.1))
    ),  # buried faces
    "open": joined(box(open_top=True), sphere(1, 0.1)),
    "beside": joined(sphere(1, 0.13, (0.0, 0.3, 0.0)), sheet()),
    "soup": soup(0),
}


class Case:
    """A topology on a T^3 grid, and the arguments for distances on some cells of an R^3 grid."""

    def __init__(self, mesh, R, T=64, cells=None, kinds=None, seed=0):
        self.topology = build_topology(mesh, TopologyConfig(resolution=T))
        self.kinds = self.topology.kinds if kinds is None else kinds(len(self.topology.kinds))
        self.R, self.tau, self.h, self.packed = (
            R,
            band(R),
            spacing(R),
            pack(self.topology.triangles),
        )
        self.half, self.trusted = sdf.SHEET_HALF_VOXELS * self.h, sdf.FLOOD_VOXELS * spacing(T)
        bins = bin_triangles(self.packed, R, max(self.tau + self.half, self.trusted) / self.h)
        counts, chosen = np.diff(bins.offsets), np.arange(len(bins.cells))
        if cells is not None and cells < len(chosen):  # prefer cells with many candidates
            random = np.random.default_rng(seed)
            chosen = np.sort(
                random.choice(chosen, cells, replace=False, p=counts**2 / (counts**2).sum())
            )
        self.cells = bins.cells[chosen]
        self.offsets = np.concatenate([[0], np.cumsum(counts[chosen])])
        self.candidates = np.concatenate(
            [bins.triangles[bins.offsets[m] : bins.offsets[m + 1]] for m in chosen]
        )

    def by_numba(self):
        shapes = sdf._shapes(self.packed, 1.0 / float(self.R - 1))
        triangles = (self.packed, shapes, self.kinds)
        candidates = (self.cells, self.offsets, self.candidates)
        sizes = (self.R, self.tau, self.half)
        sides = sdf.flood_sides(self.topology.flood)
        return sdf._fill_cells(*triangles, *candidates, *sizes, sides)

    def arguments(self):
        flood = self.topology.flood
        to = lambda array: torch.from_numpy(array).to(DEVICE)  # noqa: E731
        flood = kernel.FloodBits(
            bin_of=to(flood.bins.bin_of),
            outside=to(flood.outside.view(np.int64)),
            whole_cells=to(flood.whole_cells),
        )
        triangles = kernel.grid_triangles(to(self.packed), to(self.kinds), self.R)
        return triangles, flood, to(self.cells), to(self.offsets), to(self.candidates)

    def lengths(self):
        return {"tau": self.tau, "sheet_half": self.half, "trusted": self.trusted, "tie": TIE}

    def by_kernel(self):
        return kernel.cell_distances(*self.arguments(), **self.lengths()).cpu().numpy()

    def points(self):
        """Return the positions of all points, float64 [M, 512, 3]."""
        local = np.stack(np.unravel_index(np.arange(512), (8, 8, 8)), axis=1)
        return (self.cells[:, None].astype(np.int64) * 8 + local) * self.h - 0.5

    def check(self, values, expected):
        """Assert equal distances in the band up to LIMIT, equal signs and equal active cells."""
        limit = LIMIT * self.h
        assert not np.isnan(values).any()
        wrong = (np.signbit(values) != np.signbit(expected)) & (np.abs(expected) > limit)
        assert not wrong.any(), np.argwhere(wrong)[:5]
        assert (
            np.abs(
                np.clip(values, -self.tau, self.tau) - np.clip(expected, -self.tau, self.tau)
            ).max()
            <= limit
        )
        closest = np.abs(expected).min(axis=1)
        clear = np.abs(closest - self.tau) > limit
        np.testing.assert_array_equal(
            (np.abs(values) < self.tau).any(axis=1)[clear], (closest < self.tau)[clear]
        )


@pytest.fixture
def wide_tiles(monkeypatch):
    """Use large tiles, because the time of the interpreter depends on operations, not elements."""
    if DEVICE == "cpu":
        for name in ("NARROW_TILE", "DISTANCE_TILE", "VOTE_TILE"):
            monkeypatch.setattr(kernel, name, 64)


SOME = None if DEVICE == "cuda" else 4


@pytest.mark.parametrize(("name", "R"), [*((name, 64) for name in MESHES), ("box", 96)])
def test_values_signs_and_cells_are_those_of_the_reference(name, R, wide_tiles):
    case = Case(MESHES[name], R, cells=SOME)
    expected, active = case.by_numba()
    assert active.any()
    case.check(case.by_kernel(), expected)


@pytest.mark.parametrize(("mesh", "kinds"), [(soup(1), 3), (fans(4), 1)])
def test_random_kinds(mesh, kinds, wide_tiles):
    """Solids, sheets and buried triangles are assigned at random, which no topology does."""
    random = np.random.default_rng(0)
    case = Case(mesh, 64, cells=SOME, kinds=lambda T: random.integers(0, kinds, T).astype(np.uint8))
    assert set(case.kinds) == {*range(kinds)}
    case.check(case.by_kernel(), case.by_numba()[0])


def test_the_tiles_of_the_gpu_give_the_same_values():
    case = Case(MESHES["overlap"], 64, cells=SOME and 1, seed=3)
    assert np.diff(case.offsets).max() > kernel.DISTANCE_TILE
    case.check(case.by_kernel(), case.by_numba()[0])


def tilted(height, slope):
    """Return a large triangle with its normal up: `height` above the x-z plane, rising along x."""
    corners = np.array([[-0.45, 0, -0.4], [0, 0, 0.45], [0.45, 0, -0.4]])
    corners[:, 1] = height + slope * corners[:, 0]
    return corners


LAYER = 32 / 63 - 0.5
PLATES = {
    # A solid below the layer and one above, seen from behind, whose distances differ by 1e-8: the
    # larger vote wins.
    "solids": ([tilted(LAYER - 1 / 63, 0), tilted(LAYER + 1 / 63 - 8e-10, 1e-8)], [0, 0]),
    # A buried triangle above: the larger vote wins if they tie, otherwise the closer triangle.
    "buried": ([tilted(LAYER - 1 / 63, 0), tilted(LAYER + 1 / 63 - 2.1e-7, 4e-6)], [0, 2]),
    # The votes say inside. The flood fill, which decides beyond `trusted`, says outside.
    "limit": ([tilted(LAYER + sdf.FLOOD_VOXELS / 63 - 1e-9, 1e-8)], [0]),
    # The same limit for a sheet, with a flood fill that reached no point.
    "sheet": ([tilted(LAYER + sdf.FLOOD_VOXELS / 63 - 1e-9, 1e-8)], [1]),
}


@pytest.mark.parametrize("name", PLATES)
def test_float64_decides_what_float32_cannot(name, wide_tiles):
    """In one layer of points, sides depend on less than float32 resolves, or on a tie."""
    corners, kinds = PLATES[name]
    case = Case(mesh_of_corners(corners), 64, kinds=lambda count: np.array(kinds, np.uint8))
    case.cells, case.candidates = (
        np.array([[4, 4, 3]], np.int32),
        np.arange(len(kinds), dtype=np.int32),
    )
    case.offsets = np.array([0, len(kinds)])
    if name == "sheet":
        case.topology.flood.outside[:], case.topology.flood.whole_cells[:] = 0, False
    layer = np.arange(512) // 8 % 8 == 0
    height = ((case.points()[0, layer, None] - case.packed[:, :3]) * case.packed[:, 9:12]).sum(-1)
    assert (np.sign(height) == ([1, -1] if len(kinds) == 2 else [-1])).all()
    near, *far = np.abs(height).T
    if name == "limit":
        out = near > case.trusted
    elif name == "sheet":
        out = near <= case.trusted
    else:
        out = np.where(np.abs(near - far[0]) <= TIE, near >= far[0], near < far[0])
    assert 8 < out.sum() < 56
    expected = case.by_numba()[0]
    np.testing.assert_array_equal(~np.signbit(expected[0, layer]), out)
    np.testing.assert_array_equal(np.signbit(case.by_kernel()), np.signbit(expected))


def brute_distance(points, corners):
    """Return float64 distances [...] to the closest of triangles [T, 3, 3], by brute force."""
    best = np.full(points.shape[:-1], np.inf)
    for triangle in corners:
        normal = np.cross(triangle[1] - triangle[0], triangle[2] - triangle[0])
        normal /= np.linalg.norm(normal)
        above = np.ones(points.shape[:-1], bool)
        for k in range(3):
            start, along = triangle[k], triangle[(k + 1) % 3] - triangle[k]
            place = np.clip((points - start) @ along / (along @ along), 0, 1)
            best = np.minimum(
                best, np.linalg.norm(points - start - place[..., None] * along, axis=-1)
            )
            above &= (points - start) @ np.cross(normal, along) > 0
        best = np.where(above, np.minimum(best, np.abs((points - triangle[0]) @ normal)), best)
    return best


def test_constants_are_those_of_the_reference():
    assert (kernel.SOLID.value, kernel.SHEET.value, kernel.BURIED.value) == (SOLID, SHEET, BURIED)
    assert (kernel.SLACK.value, kernel.VOTE_ROUNDING.value) == (sdf.SLACK, VOTE_ROUNDING)
    assert kernel.CELL_SIDE == CELL_SIDE


def test_a_tetrahedron_against_brute_force(wide_tiles):
    corners = np.array(
        [[-0.31, -0.2, -0.27], [0.33, -0.22, -0.2], [-0.05, 0.35, -0.13], [0.03, 0.01, 0.3]]
    )
    faces = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [2, 0, 3]])
    case = Case(Mesh(vertices=corners, faces=faces.astype(np.int32)), 32, cells=SOME)
    points = case.points()
    inside = np.ones(points.shape[:2], bool)
    for a, b, c in corners[faces]:
        inside &= (points - a) @ np.cross(b - a, c - a) < 0
    distance = brute_distance(points, corners[faces])
    case.check(case.by_kernel(), np.where(inside, -distance, distance))


def test_one_triangle_is_a_shell(wide_tiles):
    corners = np.array([[[-0.3, 0.02, -0.2], [0.28, 0.11, -0.1], [0.05, -0.09, 0.31]]])
    case = Case(mesh_of_corners(corners), 64, cells=SOME)
    assert (case.kinds == SHEET).all()
    expected = brute_distance(case.points(), case.topology.triangles) - case.half
    assert (expected < 0).any()
    case.check(case.by_kernel(), expected)


def test_a_part_of_a_longer_list_and_no_cells():
    case = Case(MESHES["box"], 64, cells=2)
    triangles, flood, cells, offsets, candidates = case.arguments()
    whole = kernel.cell_distances(triangles, flood, cells, offsets, candidates, **case.lengths())
    part = kernel.cell_distances(
        triangles, flood, cells[1:], offsets[1:], candidates, **case.lengths()
    )
    assert torch.equal(part, whole[1:])
    assert torch.equal(
        whole, kernel.cell_distances(triangles, flood, cells, offsets, candidates, **case.lengths())
    )
    none = kernel.cell_distances(
        triangles, flood, cells[:0], offsets[:1], candidates[:0], **case.lengths()
    )
    assert none.shape == (0, 512)


def test_bad_arguments_are_named():
    case = Case(MESHES["box"], 64, cells=1)
    arguments, lengths = list(case.arguments()), case.lengths()
    packed, kinds = torch.from_numpy(case.packed), torch.from_numpy(case.kinds)
    for call, message in [
        (
            lambda: kernel.grid_triangles(packed.float(), kinds, 64),
            r"packed_T16 must be torch.float64 \[any, 16\] on cpu, got",
        ),
        (
            lambda: kernel.grid_triangles(packed, kinds[1:], 64),
            r"kinds_T must be torch.uint8 \[12\].*got torch.uint8 \[11\]",
        ),
        (
            lambda: kernel.grid_triangles(packed, kinds, 100),
            "resolution must be a positive multiple of 8, got 100",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    for at, value, message in [
        (2, arguments[2].long(), r"cells_M3 must be torch.int32 \[any, 3\]"),
        (
            2,
            arguments[2].expand(2**22, 3),
            "cells_M3 must be at most 4194303 at once, got 4194304",
        ),
        (3, arguments[3].int(), r"offsets_M1 must be torch.int64 \[2\]"),
        (4, arguments[4][None], r"candidates_E must be torch.int32 \[any\]"),
    ]:
        wrong = [*arguments[:at], value, *arguments[at + 1 :]]
        if at == 2 and len(value) > 1:
            wrong[3] = torch.zeros(len(value) + 1, dtype=torch.int64, device=DEVICE)
        with pytest.raises(ValueError, match=message):
            kernel.cell_distances(*wrong, **lengths)
    with pytest.raises(ValueError, match="tau must be 0 or more and finite, got inf"):
        kernel.cell_distances(*arguments, **{**lengths, "tau": float("inf")})
    fine = kernel.grid_triangles(packed.to(DEVICE), kinds.to(DEVICE), 2**25)
    with pytest.raises(
        ValueError,
        match=r"resolution times the flood's must be at most 2\*\*30, got 33554432 and 64",
    ):
        kernel.cell_distances(fine, *arguments[1:], **lengths)


def test_it_compiles_for_both_architectures_without_spills():
    launches = [
        launch
        for arch in (80, 90)
        for launch in compiled_launches("-m", "tests.kernels.sdf.compile_sdf", arch, "float64")
    ]
    assert [launch["name"] for launch in launches] == 2 * ["_narrow", "_distances", "_votes"]
    assert all(launch["spilled"] == 0 and launch["shared"] < 16384 for launch in launches)
    # The kernel that decides sides rounds like the CPU: each operation separately, to nearest.
    votes = [launch["float64"] for launch in launches if launch["name"] == "_votes"]
    arithmetic = re.compile(r"(add|sub|mul|div|sqrt|fma|rsqrt|rcp|ex2|sin|cos)\b")
    assert [[op for op in ops if arithmetic.match(op)] for ops in votes] == 2 * [
        ["add.rn.f64", "div.rn.f64", "mul.rn.f64", "sqrt.rn.f64", "sub.rn.f64"]
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("name", MESHES)
def test_whole_bricks_on_the_gpu(name):
    """`compute_bricks` gives the bricks of the CPU."""
    topology = build_topology(MESHES[name], TopologyConfig(resolution=128))
    for R in (128, 256):
        cpu, gpu = sdf.compute_bricks(topology, R), sdf.compute_bricks(topology, R, "cuda")
        np.testing.assert_array_equal(gpu.cells, cpu.cells)
        tau = band(R) / spacing(R)
        difference = np.abs(gpu.values.astype(np.float64) - cpu.values.astype(np.float64)) * tau
        assert difference.max() <= LIMIT + tau * 2**-11  # or the neighbouring float16 value
        np.testing.assert_array_equal(np.signbit(gpu.values), np.signbit(cpu.values))
        assert (
            gpu.sharp != cpu.sharp
        ).mean() < 1e-4  # points within 1e-3 voxels of the end of the band


@pytest.mark.gpu
def test_lists_beyond_2_to_the_31():
    """Four million copies of one cell with 65 candidates give more than 2^31 list entries."""
    case = Case(sphere(4), 64, cells=40)
    m = int(np.diff(case.offsets).argmax())
    triangles, flood, cells, offsets, candidates = case.arguments()
    start, M = int(offsets[m]), kernel.MAX_CELLS
    mine = candidates[start : int(offsets[m + 1])]
    mine = mine.repeat(-(-65 // len(mine)))[: max(65, len(mine))]
    every = torch.arange(M + 1, device=DEVICE) * len(mine)
    assert 8 * len(mine) * M > 2**31
    values = kernel.cell_distances(
        triangles, flood, cells[m : m + 1].repeat(M, 1), every, mine.repeat(M), **case.lengths()
    )
    one = kernel.cell_distances(
        triangles, flood, cells[m : m + 1], every[:2], mine, **case.lengths()
    )
    assert all((part == one).all() for part in values.split(2**18))
