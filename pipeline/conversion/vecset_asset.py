"""Samples of one asset: the function that runs in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.conversion.config import Trainer
from pipeline.conversion.surface_samples import SurfaceSampler
from pipeline.conversion.vecset_layouts import LAYOUTS, Arrays, AssetSamples, Counts
from pipeline.core.errors import Reject
from pipeline.core.files import replacing, write_atomically
from pipeline.core.grid import spacing
from pipeline.core.image_codec import encode
from pipeline.core.product import Product
from pipeline.geometry.point_sdf import PointSdf
from pipeline.geometry.sdf import SHEET_HALF_VOXELS
from pipeline.geometry.topology import build_topology
from pipeline.orchestration import asset_stages
from pipeline.orchestration.asset_results import AssetJob, AssetNotes
from pipeline.storage.layout import product_paths
from pipeline.storage.render_shard import RenderShard

NAME = "vecset"  # of the entry in the notes


@dataclass(frozen=True, kw_only=True)
class VecsetJob:
    """Work on one asset.

    Attributes:
        asset: The asset, its source, the options of the build, and a scratch directory.
        center: The centre that the build measured.
        scale: The scale of the build's normalised mesh.
        shard: Name of the build's shard.
        split: "train" or "val".
        out: Directory of all samples.
        trainer: Key of LAYOUTS.
        counts: Numbers of points.
        sharp_degrees: Dihedral angle above which an edge is sharp.
        fill_smooth: Whether uniform points take the place of sharp-edge points if there is no
            sharp edge.
        resolution: Resolution that decides the thickness of shells.
        cameras: Camera set of the renders to write as images. None writes none.
        compress: Whether npz files are compressed.
        seed: Seed of the samples.
    """

    asset: AssetJob
    center: tuple[float, ...] | None
    scale: float | None
    shard: str
    split: str
    out: Path
    trainer: Trainer
    counts: Counts
    sharp_degrees: float
    fill_smooth: bool
    resolution: int
    cameras: str | None
    compress: bool
    seed: int

    def path(self, pattern: str, **values: object) -> Path:
        """Return a path of the layout for this asset."""
        uid = self.asset.record.uid
        return self.out / pattern.format(split=self.split, shard=self.shard, uid=uid, **values)


def process(job: VecsetJob) -> None:
    """Write the samples and images of one asset. The notes are left in the scratch directory."""
    notes = AssetNotes()
    try:
        _process(job, notes)
        notes.status, notes.stage = "done", ""
    except Reject as verdict:
        notes.reject(notes.stage, verdict)
    notes.save(job.asset.folder)


def _process(job: VecsetJob, notes: AssetNotes) -> None:
    layout = LAYOUTS[job.trainer]
    mesh = asset_stages.read_mesh(job.asset, notes)
    if (tuple(notes.row["center"]), notes.row["scale"]) != (job.center, job.scale):
        raise Reject("frame_changed", scale=job.scale, now=notes.row["scale"])
    notes.stage = NAME
    notes.save(job.asset.folder)
    cfg = job.asset.config
    topology = build_topology(mesh, replace(cfg.topology, sharp_degrees=job.sharp_degrees))
    sdf = PointSdf(topology, SHEET_HALF_VOXELS * spacing(job.resolution))
    samples = AssetSamples(
        SurfaceSampler(topology, sdf),
        layout.frame(cfg.normalize.half_extent),
        (job.asset.record.uid, NAME, job.seed),
        job.fill_smooth,
    )
    for end, arrays in layout.arrays(samples, job.counts).items():
        write_npz(job.path(layout.npz, end=end), arrays, compress=job.compress)
    images = list(_write_images(job, layout.image, layout.views)) if job.cameras else []
    notes.products[NAME] = {"smooth": samples.is_smooth, "images": len(images)}


def write_npz(path: Path, arrays: Arrays, *, compress: bool) -> None:
    """Write arrays as an npz file. Equal arrays give equal bytes."""
    write = np.savez_compressed if compress else np.savez
    with replacing(path) as partial, partial.open("wb") as file:
        write(file, **arrays)  # pyright: ignore[reportArgumentType]


def _write_images(job: VecsetJob, pattern: str, views: int) -> Iterator[Path]:
    """Write the renders of an asset as PNG files and yield their paths.

    A loader that expects more images than there are views gets them again in the same order.
    """
    assert job.cameras is not None
    uid, root = job.asset.record.uid, job.asset.config.out
    shard = RenderShard(root / product_paths(Product.renders(job.cameras), job.shard)[0])
    stored = shard.views(uid)
    for number in range(max(views, len(stored))):
        view = shard.read(uid, stored[number % len(stored)])
        path = job.path(pattern, view=number)
        write_atomically(path, encode(view, "png"))
        yield path


def warm_up() -> None:
    """Compile the numba functions of the stages that a build has, too.

    Those of the samples are left to the children: they run in parallel, and a process that has
    started threads must not fork.
    """
    asset_stages.warm_up()
