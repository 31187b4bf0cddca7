"""Load a file that a test writes, and measure what came out."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import trimesh

from pipeline.core.color import srgb_to_linear
from pipeline.core.errors import Reject
from pipeline.core.schema import Mesh
from pipeline.mesh_io.config import LoadConfig
from pipeline.mesh_io.load import load_with_report

# A box with the corners (0, 0, 0) and (1, 2, 3) as quads that look outward.
BOX = np.array([[x, y, z] for x in (0, 1) for y in (0, 2) for z in (0, 3)], dtype=np.float64)
QUADS = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
BOX_AREA, BOX_VOLUME = 22.0, 6.0

# A U in the plane z = 0: 3 x 3 with a notch of 1 x 2, so its area is 7 (shoelace formula).
U_SHAPE = [(0, 0), (3, 0), (3, 3), (2, 3), (2, 1), (1, 1), (1, 3), (0, 3)]
U_AREA = 7.0


def read(
    folder: Path, name: str, content: str | bytes, **limits: int
) -> tuple[Mesh, dict[str, int]]:
    """Write a file, load it, and return the mesh and {code: count} of the warnings."""
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    mesh, report = load_with_report(path, replace(LoadConfig(), **limits))
    return mesh, {warning.code: warning.count for warning in report.warnings}


def rejected(folder: Path, name: str, content: str | bytes, **limits: int) -> str:
    """Return the reason for which a file is rejected, or "loaded"."""
    try:
        read(folder, name, content, **limits)
    except Reject as error:
        return error.reason
    return "loaded"


def area(mesh: Mesh) -> float:
    """Return the area of all triangles."""
    a, b, c = np.moveaxis(mesh.vertices[mesh.faces], 1, 0)
    return float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)


def volume(mesh: Mesh) -> float:
    """Return the signed volume that the triangles enclose."""
    a, b, c = np.moveaxis(mesh.vertices[mesh.faces], 1, 0)
    return float(np.einsum("fi,fi->", a, np.cross(b, c)) / 6)


def assert_box(mesh: Mesh) -> None:
    """Assert that a mesh is `BOX` with outward faces."""
    np.testing.assert_allclose((mesh.vertices.min(0), mesh.vertices.max(0)), ([0] * 3, [1, 2, 3]))
    assert len(mesh.faces) == 12
    np.testing.assert_allclose((area(mesh), volume(mesh)), (BOX_AREA, BOX_VOLUME))


def bumpy_sphere(seed: int) -> trimesh.Trimesh:
    """Return a closed mesh whose vertices have random distances from 0.5 to 2 from the origin."""
    sphere = trimesh.creation.icosphere(subdivisions=seed % 3)
    distances = np.random.default_rng(seed).uniform(0.5, 2, (len(sphere.vertices), 1))
    sphere.vertices *= distances
    return sphere


def colors_at(mesh: Mesh, point) -> set[tuple[int, ...]]:
    """Return the colours [r, g, b, a] of all vertices at a point."""
    found = set()
    for part in mesh.parts:
        vertices = mesh.vertices[part.vertices]
        chosen = np.abs(vertices - point).max(axis=1) < 1e-6
        if chosen.any() and part.colors is None:
            found.add(())
        elif chosen.any():
            found |= {tuple(color) for color in part.colors[chosen].tolist()}
    return found


def texel_at(mesh: Mesh, point) -> tuple[int, ...]:
    """Return the texel [r, g, b, a] that is drawn at a point of a textured surface."""
    for part in mesh.parts:
        for face in mesh.faces[part.faces]:
            corners = mesh.vertices[face]
            sides = np.column_stack([corners[1] - corners[0], corners[2] - corners[0]])
            weights, *_ = np.linalg.lstsq(sides, np.asarray(point) - corners[0], rcond=None)
            distance = np.abs(corners[0] + sides @ weights - point).max()
            shares = np.array([1 - weights.sum(), *weights])
            if distance < 1e-6 and shares.min() > -1e-9:
                u, v = (shares @ part.uv[face - part.vertices.start]) % 1
                height, width = part.material.texture.shape[:2]
                return tuple(part.material.texture[int((1 - v) * height), int(u * width)].tolist())
    raise AssertionError(f"no textured face at {point}")


def assert_fuzzed_files_are_safe(folder: Path, name: str, content: bytes, rounds: int) -> None:
    """Load damaged copies of a file. Each gives a finite mesh within the limits or a `Reject`."""
    generator = random.Random(0)
    loaded = 0
    for _ in range(rounds):
        data = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            start = generator.randrange(len(data) + 1)
            size = generator.choice((1, 1, 2, 4, 20))
            kind = generator.randrange(5)
            if kind == 0:
                data[start : start + size] = generator.randbytes(size)
            elif kind == 1:
                del data[start : start + size]
            elif kind == 2:
                source = generator.randrange(len(data) + 1)
                data[start:start] = data[source : source + size * 4]
            elif kind == 3:
                words = (
                    b"-1",
                    b"0",
                    b"4294967295",
                    b"nan",
                    b"1e999",
                    b"\n",
                    b"\\\n",
                    b"#",
                    b"\xff",
                )
                data[start : start + size] = generator.choice(words)
            else:
                data = data[: max(1, start)]
        try:
            mesh, _ = read(folder, name, bytes(data) or b"\0", max_faces=1000)
        except Reject:
            continue
        loaded += 1
        assert np.isfinite(mesh.vertices).all()
        assert 0 <= mesh.faces.min() <= mesh.faces.max() < len(mesh.vertices)
        assert len(mesh.faces) <= 1000
    assert 0 < loaded < rounds


def linear_colors(mesh) -> np.ndarray:
    """Return linear colours [F, 3, 3] at the corners of a mesh without textures."""
    colors = np.empty((len(mesh.faces), 3, 3))
    for part in mesh.parts:
        tint = np.ones((part.vertices.stop - part.vertices.start, 3))
        if part.colors is not None:
            tint = srgb_to_linear(part.colors[:, :3] / 255)
        faces = mesh.faces[part.faces] - part.vertices.start
        colors[part.faces] = (tint * part.material.base_color[:3])[faces]
    return colors
