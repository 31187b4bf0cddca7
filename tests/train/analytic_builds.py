"""Small builds for tests: bricks and renders of ellipsoids, written with the pipeline's writers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.config import VAEConfig
from pipeline.core.cameras import sample_camera
from pipeline.core.grid import CELL_SIDE, band, spacing
from pipeline.core.image_codec import encode
from pipeline.core.product import Product
from pipeline.core.schema import Bricks, View
from pipeline.storage.commit_marker import CommitMarker, describe_files
from pipeline.storage.layout import MANIFEST, manifest_path, marker_path, product_paths
from pipeline.storage.manifest import ManifestRow, write_manifest
from pipeline.storage.render_shard import write_render_shard
from pipeline.storage.sdf_shard import SdfShard, write_sdf_shard
from train.engine.config import LoopConfig
from train.stages.vae.config import BrickConfig, VAETraining

Field = Callable[[NDArray], NDArray]  # points [..., 3] in the cube -> signed distance [...]
TINY = VAEConfig(widths=(8, 8, 16, 32), heads=2, blocks=2, groups=8, mlp_ratio=2)


def ellipsoid(center: Sequence[float], radii: Sequence[float]) -> Field:
    """Return a field that is negative inside. It equals the distance only near the surface."""
    return lambda p: (
        (np.linalg.norm((p - np.array(center)) / np.array(radii), axis=-1) - 1) * min(radii)
    )


def grid(resolution: int) -> NDArray[np.float64]:
    """Return the positions of the grid points, [R, R, R, 3]."""
    axis = np.arange(resolution) * spacing(resolution) - 0.5
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1)


def bricks_of(field: Field, resolution: int, points: NDArray | None = None) -> Bricks:
    """Return the bricks of a field.

    Active points with x + 2 y > 0.1 are marked as sharp, so that symmetries change the marks, too.
    """
    points = grid(resolution) if points is None else points
    values = np.clip(field(points) / band(resolution), -1, 1).astype(np.float16)
    sharp = (np.abs(values) < 1) & (points[..., 0] + 2 * points[..., 1] > 0.1)
    values, sharp = _blocks(values), _blocks(sharp)
    blocks = np.argwhere((np.abs(values) < 1).any(axis=-1))
    rows = tuple(blocks.T)
    return Bricks(
        resolution=resolution,
        cells=blocks.astype(np.int16),
        values=values[rows],
        sharp=np.packbits(sharp[rows], axis=1, bitorder="little"),
    )


def _blocks(dense: NDArray) -> NDArray:
    side = len(dense) // CELL_SIDE
    cut = dense.reshape(side, CELL_SIDE, side, CELL_SIDE, side, CELL_SIDE).transpose(
        0, 2, 4, 1, 3, 5
    )
    return cut.reshape(side, side, side, CELL_SIDE**3)


def shape(number: int) -> Field:
    """Return an ellipsoid that depends on a number."""
    rng = np.random.default_rng(number)
    return ellipsoid(rng.uniform(-0.12, 0.12, 3), rng.uniform(0.1, 0.3, 3))


def make_build(
    root: Path,
    *,
    assets: int = 6,
    val: int = 2,
    resolutions: Sequence[int] = (32,),
    shard_size: int = 4,
    field: Callable[[int], Field] = shape,
) -> Path:
    """Write a committed build.

    Args:
        root: Directory of the build.
        assets: Number of training assets.
        val: Number of held-out assets.
        resolutions: Resolutions of the bricks.
        shard_size: Number of assets per shard.
        field: The shape of each asset by its number.
    """
    uids = [f"analytic-{number:020d}" for number in range(assets + val)]
    for first in range(0, len(uids), shard_size):
        name = f"{first // shard_size:06d}"
        chosen = range(first, min(first + shard_size, len(uids)))
        rows = [
            ManifestRow(
                uid=uids[number],
                status="done",
                shard=name,
                row=number - first,
                split="train" if number < assets else "val",
            )
            for number in chosen
        ]
        for resolution in resolutions:
            made = [bricks_of(field(number), resolution) for number in chosen]
            path = root / product_paths(Product.sdf(resolution), name)[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_sdf_shard(
                path, resolution, [(uids[n], b) for n, b in zip(chosen, made, strict=True)], "test"
            )
            for row, bricks in zip(rows, made, strict=True):
                row.tokens[resolution] = len(bricks.cells)
            commit(root, name, Product.sdf(resolution))
        write_manifest(manifest_path(root, name), rows, resolutions)
        commit(root, name, MANIFEST)
    return root


def commit(root: Path, shard: str, product: Product | str) -> None:
    """Write the commit marker of a product, or of a manifest."""
    paths = (
        product_paths(product, shard)
        if isinstance(product, Product)
        else [manifest_path(Path(), shard)]
    )
    files = describe_files(root, paths)
    marker = CommitMarker(
        shard=shard,
        product=str(product),
        counts={},
        bytes=sum(file.bytes for file in files),
        files=files,
    )
    path = marker_path(root, shard, product)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(marker.to_json(), encoding="utf-8")


def color_of(number: int, view: int) -> tuple[int, int, int]:
    """Return a colour: red and green depend on the asset, blue depends on the view."""
    return (20, 230)[number % 2], (20, 230)[number // 2 % 2], 10 + 40 * view


def add_renders(root: Path, views: int = 5) -> None:
    """Add renders to every shard of a build: discs in the colour of the asset and view."""
    row, column = np.mgrid[:40, :40] / 40 - 0.5
    inside = np.uint8(255 * (row**2 + column**2 < 0.12))
    for path in sorted((root / "sdf" / "32").glob("*.zarr")):
        entries = []
        for uid in SdfShard(path).uids:
            made = []
            for view in range(views):
                rgb = np.tile(np.uint8(color_of(int(uid[-3:]), view)), (40, 40, 1))
                meta = {
                    "uid": uid,
                    "view": view,
                    **sample_camera(uid, view).meta(),
                    "width": 40,
                    "height": 40,
                }
                made.append((encode(View(rgba=np.dstack([rgb, inside]), meta=meta)), meta))
            entries.append((uid, made))
        write_render_shard(root / "renders" / "paper" / f"{path.stem}.tar", entries)
        commit(root, path.stem, Product.renders("paper"))


def short_loop(**options: Any) -> LoopConfig:
    """Return the trainer's options of a run that takes seconds: fp32, no validation or previews."""
    defaults = {
        "precision": "fp32",
        "warmup_steps": 2,
        "log_every": 10,
        "checkpoint_every": 10,
        "validate_every": 0,
        "sample_every": 0,
    }
    return LoopConfig(**{**defaults, **options})


def tiny_training(data: Path, out: Path, *, steps: int = 4, **options: Any) -> VAETraining:
    """Return the options of a VAE run that takes seconds.

    `options` belong to the run, to the trainer, or to the bricks, whichever has an option of that
    name.
    """
    loop: dict[str, Any] = {"steps": steps, "learning_rate": 1e-3}
    bricks: dict[str, Any] = {"resolutions": (32,), "batch_size": 2, "workers": 1}
    run: dict[str, Any] = {}
    for name, value in options.items():
        if name in VAETraining.__dataclass_fields__:
            run[name] = value
            continue
        (loop if name in LoopConfig.__dataclass_fields__ else bricks)[name] = value
    return VAETraining(
        data=data,
        out=out,
        device="cpu",
        bricks=BrickConfig(**bricks),
        loop=short_loop(**loop),
        model=TINY,
        **run,
    )
