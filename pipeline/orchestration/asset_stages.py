"""One asset from its record to finished files in scratch: the stages in order, and what became of them."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import BuildConfig
from pipeline.core.errors import Reject, Transient
from pipeline.core.grid import CELL_SIDE
from pipeline.core.image_codec import encode
from pipeline.core.product import Product
from pipeline.core.schema import BRICK_ARRAYS, Bricks, Mesh, Record
from pipeline.curation.filters import filter_file, filter_geometry, filter_metadata
from pipeline.curation.screening_metrics import compute_metrics, save_metrics
from pipeline.geometry import sdf_cuda
from pipeline.geometry.config import TopologyConfig
from pipeline.geometry.sdf import compute_bricks
from pipeline.geometry.topology import Topology, build_topology
from pipeline.mesh_io.load import load_with_report
from pipeline.mesh_io.normalize import normalize
from pipeline.rendering import gl_renderer
from pipeline.rendering.views import render_views, renderer_string
from pipeline.sources import Source
from pipeline.storage.render_shard import save_view

NOTES = (
    "asset.json"  # what the stages found so far; whoever comes after a crash reads how far they got
)


@dataclass(frozen=True, kw_only=True)
class AssetJob:
    """Work on one asset. `folder` exists, is empty and belongs to it alone."""

    record: Record
    source: Source | None  # None: nothing will be fetched, only the job's end is noted
    config: BuildConfig
    products: tuple[Product, ...]
    folder: Path
    gpu: str | None = (
        None  # the one it may use, as CUDA numbers them; None: any for pictures, the first for distances
    )


@dataclass(kw_only=True)
class Notes:
    """What is known about an asset so far; the file is replaced as a whole at every step."""

    stage: str = "start"
    status: str = "running"  # then done | rejected | failed
    reason: str = ""
    row: dict[str, Any] = field(default_factory=dict)  # columns of the manifest
    numbers: dict[str, Any] = field(default_factory=dict)
    products: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # those that are finished, with their counts
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    transient: bool = False  # it failed, and may not fail another time

    def save(self, folder: Path) -> None:
        partial = folder / f"{NOTES}.partial"
        partial.write_text(json.dumps(asdict(self), default=_plain))
        partial.replace(folder / NOTES)

    @staticmethod
    def load(folder: Path) -> Notes:
        path = folder / NOTES
        return Notes(**json.loads(path.read_text())) if path.exists() else Notes()

    def reject(self, stage: str, verdict: Reject) -> None:
        """The first verdict names the asset's fate; the numbers of all are kept."""
        if isinstance(verdict, Transient):
            self.stage, self.status, self.reason, self.transient = (
                stage,
                "failed",
                verdict.reason,
                True,
            )
        elif self.status != "rejected":
            self.stage, self.status, self.reason = stage, "rejected", verdict.reason
        self.numbers |= verdict.numbers


def process(job: AssetJob) -> None:
    """Every stage of one asset. Its notes and the files of each finished product are left in the job's folder.

    A product that turns the asset away does not keep the others from being made, so that a product's bytes do not
    depend on which others were asked for. A rejection, or a failure to fetch, before the first product ends the asset.
    """
    notes = Notes()
    if job.gpu is not None:
        sdf_cuda.select_gpu(job.gpu)
    try:
        mesh, topology = _prepare(job, notes)
    except Reject as verdict:
        notes.reject(notes.stage, verdict)
        notes.save(job.folder)
        return
    for product in job.products:
        try:
            with _stage(job, notes, str(product)):
                notes.products[str(product)] = _make(job, product, mesh, topology)
        except Reject as verdict:
            notes.reject(str(product), verdict)
    if notes.status == "running":
        notes.status, notes.stage = "done", ""
    notes.save(job.folder)


def _prepare(job: AssetJob, notes: Notes) -> tuple[Mesh, Topology]:
    """The stages that all products share."""
    record, cfg = job.record, job.config
    with _stage(job, notes, "metadata"):
        filter_metadata(record, cfg.filter)
    with _stage(job, notes, "fetch"):
        scratch = job.folder / "input"
        scratch.mkdir()
        assert job.source is not None
        try:
            path = job.source.materialize(record, scratch)
            with path.open("rb") as file:
                notes.row["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
            raise Reject("file_not_readable", error=type(error).__name__) from error
        if record.sha256 not in (None, notes.row["sha256"]):
            raise Reject("wrong_sha256", expected=record.sha256)
    with _stage(job, notes, "file"):
        notes.numbers |= filter_file(path, cfg.filter)
    with _stage(job, notes, "load"):
        mesh, report = load_with_report(path, cfg.load, up=cfg.up)
        if report.warnings:
            notes.numbers["load_warnings"] = list(report.warnings)
    with _stage(job, notes, "normalize"):
        mesh = normalize(mesh, cfg.normalize)
        notes.row |= {"center": list(mesh.center), "scale": mesh.scale}
    with _stage(job, notes, "geometry"):
        notes.row |= filter_geometry(mesh, cfg.filter)
    with _stage(job, notes, "topology"):
        topology = build_topology(mesh, cfg.topology)
        notes.row["sign_path"] = topology.sign_path
        notes.numbers |= topology.numbers
    return mesh, topology


def _make(job: AssetJob, product: Product, mesh: Mesh, topology: Topology) -> dict[str, Any]:
    """Write one product's files; returns what its marker and the manifest count."""
    folder = job.folder / str(product)
    folder.mkdir()
    if product.kind == "screen":
        save_metrics(folder, compute_metrics(mesh, topology, job.config.screen))
        return {}
    if product.kind == "sdf":
        bricks = compute_bricks(topology, product.resolution, job.config.device)
        save_bricks(folder, bricks)
        return {"tokens": len(bricks.cells), "device": sdf_cuda.device_name(job.config.device)}
    cfg, uid = job.config.render, job.record.uid
    with gl_renderer.on_gpu(job.gpu):
        for view in render_views(mesh, uid, cfg):
            save_view(
                folder, uid, view.meta["view"], encode(view, cfg.format), view.meta, cfg.format
            )
        return {"views": cfg.views, "renderer": renderer_string()}


def save_bricks(folder: Path, bricks: Bricks) -> None:
    """One file an array. Not np.save: a full disk must surface as OSError with its errno."""
    for member, name in BRICK_ARRAYS.items():
        (folder / f"{name}.bin").write_bytes(np.ascontiguousarray(getattr(bricks, member)).data)


def load_bricks(folder: Path, resolution: int) -> Bricks:
    """What `save_bricks` wrote, mapped rather than read."""
    shapes = {
        "cells": (np.int16, 3),
        "values": (np.float16, CELL_SIDE**3),
        "sharp": (np.uint8, CELL_SIDE**3 // 8),
    }
    arrays: dict[str, Any] = {
        member: np.memmap(folder / f"{BRICK_ARRAYS[member]}.bin", dtype, mode="r").reshape(
            -1, width
        )
        for member, (dtype, width) in shapes.items()
    }
    return Bricks(resolution=resolution, **arrays)


def warm_up() -> None:
    """Takes an open box with a loose sheet through the geometry: children are forked with compiled code in place.

    The renderer is imported but not started: a graphics context does not survive a fork.
    """
    corners = np.stack(np.meshgrid(*[[-0.4, 0.4]] * 3, indexing="ij"), axis=-1).reshape(8, 3)
    sides = np.array([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4]])
    sheet = np.array([[-0.2, 0.45, 0.0], [0.2, 0.45, 0.0], [0.0, 0.45, 0.2]])
    faces = np.concatenate([sides[:, [0, 1, 2]], sides[:, [0, 2, 3]], [[8, 9, 10]]]).astype(
        np.int32
    )
    mesh = Mesh(vertices=np.concatenate([corners, sheet]), faces=faces)
    filter_geometry(mesh, BuildConfig().filter)
    compute_bricks(build_topology(mesh, TopologyConfig(resolution=64)), 64)
    gl_renderer.import_pyrender()


def warm_up_cuda() -> None:
    """As `warm_up`, and torch and the kernels beside it. CUDA is left to the children: it does not survive a fork."""
    warm_up()
    sdf_cuda.warm_up()


@contextmanager
def _stage(job: AssetJob, notes: Notes, name: str) -> Iterator[None]:
    started = time.perf_counter()
    rejected = notes.status == "rejected"
    if not rejected:
        notes.stage = name
    notes.save(job.folder)
    try:
        yield
    finally:
        notes.seconds[name] = time.perf_counter() - started


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return str(value)
