"""Meshes of the report's 3D view: originals and surfaces of bricks, small enough to embed.

A process of its own reads the assets, because a file may crash a library.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import BuildConfig
from pipeline.core.color import linear_to_srgb, srgb_to_linear
from pipeline.core.errors import Reject
from pipeline.core.files import write_atomically
from pipeline.core.hashing import sha256_of
from pipeline.core.primitives.marching_cubes import extract
from pipeline.core.primitives.simplification import collapse_edges
from pipeline.core.primitives.surface_distance import TriangleTree
from pipeline.core.product import Product
from pipeline.core.schema import Mesh, Part, Record
from pipeline.mesh_io.load import load_with_report
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.normalize import normalize
from pipeline.mesh_io.visible_parts import keep_visible
from pipeline.sources import Source, side_file_root
from pipeline.storage.layout import product_paths
from pipeline.storage.remote import StorePath
from pipeline.storage.render_shard import RenderShard
from pipeline.storage.sdf_shard import SdfShard

LEVELS = 65535  # of a quantised coordinate
COLORS = 12  # of one mesh
THUMBNAIL_SIDE = 96  # pixels
FIRST_LATTICE = 256  # points on a side of the finest lattice on which vertices are merged
# Barycentric coordinates of the points of a face at which its texture is read, [samples, 3].
SHARES = np.array(
    [[i + 1 / 3, j + 1 / 3, 4 - i - j - 2 / 3] for i in range(4) for j in range(4 - i)]
)
SHARES /= 4
STARTED, NOTES = "started", "notes.json"


@dataclass(frozen=True, kw_only=True)
class ShownAsset:
    """An asset whose meshes are embedded.

    Attributes:
        record: The asset.
        shard: Its shard.
        sha256: Hash of the file that the build read.
        source: Where the original is. None if it is not read.
        has_products: Whether the build has bricks and renders of it.
    """

    record: Record
    shard: str
    sha256: str | None
    source: Source | None
    has_products: bool


@dataclass(frozen=True, kw_only=True)
class MeshJob:
    """A request to write files for several assets into `folder`/<uid>.

    Attributes:
        out: Output directory or URL of the build.
        assets: The assets.
        config: Options with which originals are read.
        resolution: Resolution of the bricks, None if there are none.
        cameras: Camera set of the renders, None if there are none.
        faces: Number of faces to which a mesh is simplified.
        folder: Directory for the results.
    """

    out: StorePath
    assets: tuple[ShownAsset, ...]
    config: BuildConfig | None
    resolution: int | None
    cameras: str | None
    faces: int
    folder: Path


def make_meshes(job: MeshJob) -> None:
    """Write original.bin, bricks.bin, thumbnail.webp and notes.json of one asset after the other.

    What an asset does not have is left out, and the notes say why. Assets with notes are skipped.
    """
    for asset in job.assets:
        folder = job.folder / asset.record.uid
        if (folder / NOTES).exists():
            continue
        folder.mkdir(exist_ok=True)
        (folder / STARTED).touch()
        notes: dict[str, Any] = {}
        if asset.source is not None and job.config is not None:
            try:
                mesh = read_original(asset, job.config, folder / "input")
                notes["original"] = _write_mesh(folder / "original.bin", mesh, job.faces)
            except Reject as verdict:
                notes["no_original"] = str(verdict)
            except OSError as error:
                notes["no_original"] = f"{type(error).__name__}: {error.strerror}"
        if asset.has_products and job.resolution is not None:
            path = job.out / product_paths(Product.sdf(job.resolution), asset.shard)[0]
            vertices, faces = extract(SdfShard(path).bricks(asset.record.uid))
            if len(faces):
                mesh = Mesh(vertices=vertices, faces=faces)
                notes["bricks"] = _write_mesh(folder / "bricks.bin", mesh, job.faces)
        if asset.has_products and job.cameras is not None:
            path = job.out / product_paths(Product.renders(job.cameras), asset.shard)[0]
            view = RenderShard(path).read(asset.record.uid, 0)
            (folder / "thumbnail.webp").write_bytes(_thumbnail(view.rgba))
        write_atomically(folder / NOTES, json.dumps(notes))


def read_original(asset: ShownAsset, cfg: BuildConfig, scratch: Path) -> Mesh:
    """Read an asset from its source as the build did, without the filters.

    Raises:
        Reject: If the file cannot be read, or is another one than the build read ("changed").
    """
    assert asset.source is not None
    scratch.mkdir(exist_ok=True)
    path = asset.source.materialize(asset.record, scratch)
    if asset.sha256 is not None and sha256_of(path) != asset.sha256:
        raise Reject("changed")
    root = side_file_root(asset.source, path, scratch)
    mesh, _ = load_with_report(path, cfg.load, up=cfg.up, root=root)
    mesh, _ = keep_visible(mesh, WarningLog())
    return normalize(mesh, cfg.normalize)


def _thumbnail(rgba: NDArray[np.uint8]) -> bytes:
    """Return a small WebP file of a render."""
    image, file = Image.fromarray(rgba), BytesIO()
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    image.save(file, "WEBP", quality=60, method=4)
    return file.getvalue()


def _write_mesh(path: Path, mesh: Mesh, faces: int) -> int:
    """Write a small mesh, compressed. Return the number of faces of the whole mesh."""
    vertices, few = simplify(mesh.vertices, mesh.faces, faces)
    colors = None
    if mesh.parts:
        centers = vertices[few].mean(axis=1)
        nearest = TriangleTree(mesh.vertices, mesh.faces).closest(centers)[1]
        colors = face_colors(mesh)[nearest]
    path.write_bytes(zlib.compress(pack_mesh(vertices, few, colors), 9))
    return len(mesh.faces)


def simplify(
    vertices: NDArray[np.float64], faces: NDArray[np.int32], target: int
) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Reduce a mesh to about `target` faces, and at most twice as many.

    Edges are collapsed. Where that does not suffice, because the surface consists of many separate
    pieces, vertices are merged on a lattice.
    """
    # merge equal vertices, because files repeat them at seams of the texture
    _, first, inverse = np.unique(
        np.round(vertices * 2**20).astype(np.int64), axis=0, return_index=True, return_inverse=True
    )
    points, triangles = vertices[first], inverse.reshape(-1).astype(np.int32)[faces]
    triangles = _without_collapsed(triangles)
    if len(triangles) > target:
        triangles = collapse_edges(points, triangles, target)
    lattice = FIRST_LATTICE
    while len(triangles) > 2 * target:
        keys = np.round(points * lattice).astype(np.int64)
        _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        points = points[first]
        triangles = _without_collapsed(inverse.reshape(-1).astype(np.int32)[triangles])
        _, single = np.unique(np.sort(triangles, axis=1), axis=0, return_index=True)
        triangles, lattice = triangles[np.sort(single)], lattice * 3 // 4
    used = np.zeros(len(points), np.bool_)
    used[triangles] = True
    return points[used], (np.cumsum(used) - 1)[triangles].astype(np.int32)


def _without_collapsed(faces: NDArray[np.int32]) -> NDArray[np.int32]:
    a, b, c = faces.T
    return faces[(a != b) & (b != c) & (c != a)]


def face_colors(mesh: Mesh) -> NDArray[np.float64]:
    """Return the mean linear base colour of each face, float64 [F, 3]."""
    colors = np.full((len(mesh.faces), 3), 0.8)
    for part in mesh.parts:
        faces = mesh.faces[part.faces] - part.vertices.start
        colors[part.faces] = _part_colors(part, faces)
    return colors


def _part_colors(part: Part, faces: NDArray[np.int32]) -> NDArray[np.float64]:
    color = np.tile(np.array(part.material.base_color[:3]), (len(faces), 1))
    texture = part.material.texture
    if texture is not None and part.uv is not None:
        height, width = texture.shape[:2]
        uv = np.nan_to_num(SHARES @ part.uv[faces].astype(np.float64))  # [F, samples, 2]
        column = np.floor(uv[..., 0] % 1 * width).astype(int) % width
        row = np.floor((1 - uv[..., 1]) % 1 * height).astype(int) % height
        color *= srgb_to_linear(texture[row, column, :3] / 255).mean(axis=1)
    if part.colors is not None:
        color *= srgb_to_linear(part.colors[faces][..., :3].mean(axis=1) / 255)
    return color


def pack_mesh(
    vertices: NDArray[np.float64], faces: NDArray[np.int32], colors: NDArray[np.float64] | None
) -> bytes:
    """Return a mesh in few bytes, little-endian, as build_report.js reads it.

    Three uint32 state the numbers of vertices, faces and groups. Each group of faces of one colour
    has three float32 (linear RGB, NaN for the viewer's own colour) and the uint32 number of its
    faces. The positions follow as three uint16 per vertex, which are 0..LEVELS across the cube, and
    then three uint16 vertex numbers per face, sorted by group.

    Args:
        vertices: [V, 3] in the cube [-0.5, 0.5]^3, at most LEVELS of them.
        faces: [F, 3].
        colors: Linear RGB of each face, [F, 3]. None leaves the colour to the viewer.

    Returns:
        The bytes. Faces without area are left out.

    Raises:
        ValueError: If there are more vertices.
    """
    if len(vertices) > LEVELS:
        raise ValueError(f"vertices must be {LEVELS} or fewer, got {len(vertices)}")
    points = np.round(np.clip(vertices + 0.5, 0, 1) * LEVELS)
    a, b, c = points[faces].transpose(1, 0, 2)
    keep = np.cross(b - a, c - a).any(axis=1)  # faces without area would have no normal
    faces, colors = faces[keep], colors if colors is None else colors[keep]
    groups = _color_groups(faces, colors)
    chunks = [struct.pack("<3I", len(vertices), len(faces), len(groups))]
    chunks += [struct.pack("<3fI", *color, len(group)) for color, group in groups]
    chunks.append(points.astype("<u2").tobytes())
    chunks += [group.astype("<u2").tobytes() for _, group in groups]
    return b"".join(chunks)


def _color_groups(
    faces: NDArray[np.int32], colors: NDArray[np.float64] | None
) -> list[tuple[NDArray[np.float64], NDArray[np.int32]]]:
    """Group faces by up to COLORS colours."""
    if colors is None or not len(faces):
        return [(np.full(3, np.nan), faces)]
    rgb = np.round(255 * linear_to_srgb(np.clip(colors, 0, 1))).astype(np.uint8)
    image = Image.fromarray(rgb[None]).quantize(COLORS, dither=Image.Dither.NONE)
    number = np.asarray(image)[0]
    return [(colors[number == n].mean(axis=0), faces[number == n]) for n in np.unique(number)]


def warm_up() -> None:
    """Do nothing. The children load compiled code, and threads must not start before a fork."""
