"""A synthetic build for benchmarks of reading: bricks, latents and renders that are made quickly.

Cells, values and latents have the sizes of real ones: about 2,000 cells an asset at R = 256, of
about 300 bytes each in the store.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import zarr
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.cameras import sample_camera
from pipeline.core.files import write_atomically
from pipeline.core.grid import CELL_SIDE, band, spacing
from pipeline.core.product import Product
from pipeline.core.provenance import FORMAT_VERSION
from pipeline.core.schema import Bricks
from pipeline.storage.commit_marker import CommitMarker, describe_files
from pipeline.storage.layout import MANIFEST, manifest_path, marker_path, product_paths
from pipeline.storage.manifest import ManifestRow, write_manifest
from pipeline.storage.render_shard import write_render_shard
from pipeline.storage.sdf_shard import write_sdf_shard
from train.data.latents import Latent, write_latent_shard

VAE = "synthetic-000"  # stands for the hash of the VAE
CHANNELS = 16
CAMERAS = "paper"
DISTINCT_IMAGES = 4  # of each shard; encoding every image anew would take minutes
DISTINCT_ASSETS = 16  # of each shard
HELD_OUT = 2  # assets, of the first shard


@dataclass(frozen=True, kw_only=True)
class BuildSize:
    """How large a synthetic build is.

    Args:
        resolution: Resolution R of the bricks.
        assets: Number of assets.
        shard_size: Number of assets of a shard.
        views: Number of views of each asset.
        image_size: Pixels per side of a render.
    """

    resolution: int
    assets: int
    shard_size: int
    views: int
    image_size: int

    @property
    def shards(self) -> int:
        """Number of shards, all of which are full."""
        return -(-self.assets // self.shard_size)


def finish_latents(root: Path, size: BuildSize) -> None:
    """Write the statistics of the latents, after all shards."""
    content = {"format_version": FORMAT_VERSION, "mean": [0.0] * CHANNELS, "std": [1.0] * CHANNELS}
    path = root / "latents" / VAE / str(size.resolution) / "stats.json"
    write_atomically(path, json.dumps(content))


def product_bytes(root: Path, name: str) -> int:
    """Return the number of bytes below a folder of a build, such as "sdf"."""
    return sum(path.stat().st_size for path in (root / name).rglob("*") if path.is_file())


def make_shard(root: Path, size: BuildSize, number: int) -> None:
    """Write one shard of every product with its manifest and markers.

    Its bricks and latents are those of DISTINCT_ASSETS assets, again and again.
    """
    shard, uids = _names(size, number)
    seeds = [number * DISTINCT_ASSETS + row for row in range(min(DISTINCT_ASSETS, len(uids)))]
    distinct = [bumpy_ball(size.resolution, seed) for seed in seeds]
    assets = [distinct[row % len(distinct)] for row in range(len(uids))]
    path, latents = _shard_paths(root, size, shard)
    for parent in (path.parent, latents.parent):
        parent.mkdir(parents=True, exist_ok=True)
    write_sdf_shard(path, size.resolution, zip(uids, assets, strict=True), "benchmark")
    write_latent_shard(
        latents,
        _latents(uids, assets, number),
        resolution=size.resolution,
        vae=VAE,
        channels=CHANNELS,
        source="benchmark",
    )
    _finish_shard(root, size, number, [len(bricks.cells) for bricks in assets])


def copy_shard(root: Path, size: BuildSize, template: int, number: int) -> None:
    """Write another shard with the bricks and the latents of `template`."""
    shard, uids = _names(size, number)
    sources = _shard_paths(root, size, _names(size, template)[0])
    for source, target in zip(sources, _shard_paths(root, size, shard), strict=True):
        shutil.copytree(source, target)
        group = zarr.open_group(target, mode="r+", zarr_format=3)
        group.update_attributes({"uids": uids})
    offsets = np.asarray(group["offsets"][:])
    _finish_shard(root, size, number, np.diff(offsets).tolist())


def _names(size: BuildSize, number: int) -> tuple[str, list[str]]:
    """Return the name of a shard and the uids of its assets."""
    first = number * size.shard_size
    return f"{number:06d}", [f"synthetic-{first + row:08d}" for row in range(size.shard_size)]


def _shard_paths(root: Path, size: BuildSize, shard: str) -> tuple[Path, Path]:
    """Return the stores of a shard's bricks and latents."""
    sdf = root / product_paths(Product.sdf(size.resolution), shard)[0]
    return sdf, root / "latents" / VAE / str(size.resolution) / f"{shard}.zarr"


def _finish_shard(root: Path, size: BuildSize, number: int, tokens: Sequence[int]) -> None:
    """Write the renders, the manifest and the markers of a shard."""
    shard, uids = _names(size, number)
    renders = Product.renders(CAMERAS)
    path = root / product_paths(renders, shard)[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_render_shard(path, _views(uids, size, number))
    rows = [
        ManifestRow(
            uid=uid,
            status="done",
            shard=shard,
            row=row,
            split="val" if number == 0 and row < HELD_OUT else "train",
            tokens={size.resolution: count},
        )
        for row, (uid, count) in enumerate(zip(uids, tokens, strict=True))
    ]
    path = manifest_path(root, shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(path, rows, [size.resolution])
    for product in (Product.sdf(size.resolution), renders, MANIFEST):
        _commit(root, shard, product)


def _commit(root: Path, shard: str, product: Product | str) -> None:
    is_manifest = isinstance(product, str)
    paths = [manifest_path(Path(), shard)] if is_manifest else product_paths(product, shard)
    files = describe_files(root, paths)
    total = sum(file.bytes for file in files)
    marker = CommitMarker(shard=shard, product=str(product), counts={}, bytes=total, files=files)
    path = marker_path(root, shard, product)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, marker.to_json())


def bumpy_ball(resolution: int, seed: int) -> Bricks:
    """Return the bricks of a ball with waves on its surface."""
    rng = np.random.default_rng(seed)
    radius = rng.uniform(0.24, 0.33)
    waves, phases = rng.uniform(-30, 30, (4, 3)), rng.uniform(0, 2 * np.pi, 4)

    def distance(points: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return about the distance of points [..., 3] from the surface."""
        bumps = np.sin(points @ waves.T.astype(np.float32) + phases.astype(np.float32)).sum(-1)
        return (np.linalg.norm(points, axis=-1) - np.float32(radius) - 0.004 * bumps) / 1.2

    side = resolution // CELL_SIDE
    step = np.float32(spacing(resolution))
    corners = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)
    centers = (corners * CELL_SIDE + (CELL_SIDE - 1) / 2) * step - np.float32(0.5)
    near = np.abs(distance(centers.astype(np.float32))) < CELL_SIDE * step + band(resolution)
    cells = corners[near]
    inner = np.stack(np.meshgrid(*[np.arange(CELL_SIDE)] * 3, indexing="ij"), -1).reshape(-1, 3)
    points = ((cells[:, None] * CELL_SIDE + inner) * step - np.float32(0.5)).astype(np.float32)
    values = np.clip(distance(points) / band(resolution), -1, 1).astype(np.float16)
    active = (np.abs(values) < 1).any(axis=1)
    values, cells = values[active], cells[active]
    sharp = (np.abs(values) < 1) & (rng.random((len(values), 1)) < 0.1)
    return Bricks(
        resolution=resolution,
        cells=cells.astype(np.int16),
        values=values,
        sharp=np.packbits(sharp, axis=1, bitorder="little"),
    )


def _latents(
    uids: Sequence[str], assets: Sequence[Bricks], seed: int
) -> Iterator[tuple[str, bool, Latent]]:
    rng = np.random.default_rng(seed)
    for uid, bricks in zip(uids, assets, strict=True):
        mean = rng.standard_normal((len(bricks.cells), CHANNELS), np.float32).astype(np.float16)
        logvar = np.full_like(mean, -4) + mean / 8
        yield uid, True, Latent(cells=bricks.cells, mean=mean, logvar=logvar)


def _views(
    uids: Sequence[str], size: BuildSize, seed: int
) -> list[tuple[str, list[tuple[bytes, dict]]]]:
    images = [_image(size.image_size, seed * DISTINCT_IMAGES + n) for n in range(DISTINCT_IMAGES)]
    sides = {"width": size.image_size, "height": size.image_size}
    entries = []
    for row, uid in enumerate(uids):
        views = []
        for view in range(size.views):
            meta = {"uid": uid, "view": view, **sample_camera(uid, view).meta(), **sides}
            views.append((images[(row + view) % DISTINCT_IMAGES], meta))
        entries.append((uid, views))
    return entries


def _image(side: int, seed: int) -> bytes:
    """Return a PNG file: a textured disc on a transparent ground."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:side, :side] / side - 0.5
    texture = rng.integers(0, 256, (side // 4 + 1, side // 4 + 1, 3), np.uint8)
    texture = texture.repeat(4, 0).repeat(4, 1)[:side, :side]
    alpha = np.uint8(255 * (row**2 + column**2 < 0.16))
    file = BytesIO()
    Image.fromarray(np.dstack([texture, alpha])).save(file, "png", compress_level=1)
    return file.getvalue()
