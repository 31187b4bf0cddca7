"""The stages of one asset, from its record to the finished files of each product in scratch."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import BuildConfig
from pipeline.core.errors import Reject
from pipeline.core.grid import CELL_SIDE
from pipeline.core.hashing import sha256_of
from pipeline.core.image_codec import encode
from pipeline.core.product import TRANSFORMS, Product
from pipeline.core.schema import BRICK_ARRAYS, Bricks, Mesh
from pipeline.curation.filters import (
    filter_file,
    filter_geometry,
    filter_metadata,
    filter_share,
    filter_warnings,
)
from pipeline.curation.screening_metrics import compute_metrics, save_metrics
from pipeline.curation.shape_moments import shape_signatures
from pipeline.geometry import sdf_cuda
from pipeline.geometry.config import TopologyConfig
from pipeline.geometry.sdf import compute_bricks
from pipeline.geometry.thinness import thin_share
from pipeline.geometry.topology import Topology, build_topology
from pipeline.mesh_io import visible_parts
from pipeline.mesh_io.load import load_with_report
from pipeline.mesh_io.load_warnings import WarningLog
from pipeline.mesh_io.normalize import normalize
from pipeline.mesh_io.visible_parts import keep_visible
from pipeline.orchestration.asset_results import AssetJob, AssetNotes
from pipeline.rendering.gl_context import on_gpu, renderer_string
from pipeline.rendering.surface_views import surface_views, view_cameras
from pipeline.rendering.transforms import dump_transforms, transforms_of
from pipeline.rendering.views import render_views
from pipeline.sources import side_file_root
from pipeline.storage.manifest import thin_share_name
from pipeline.storage.render_shard import save_view, view_key
from pipeline.storage.transforms_shard import MEMBER


def process(job: AssetJob) -> None:
    """Take an asset through all its stages.

    The notes and the files of each finished product are left in the job's directory. A product
    that rejects the asset does not keep the other products from being made, so the bytes of a
    product do not depend on which other products are made. A rejection or a failed download
    before the first product ends the asset.

    Args:
        job: The asset and the products to make.
    """
    notes = AssetNotes()
    if job.gpu is not None:
        sdf_cuda.select_gpu(job.gpu)
    try:
        mesh, topology = _prepare(job, notes)
    except Reject as verdict:
        notes.reject(notes.stage, verdict)
        notes.save(job.folder)
        return
    for product in job.products:
        name = str(product)
        try:
            with _stage(job, notes, name):
                notes.products[name] = _make_product(job, product, mesh, topology, notes)
        except Reject as verdict:
            notes.reject(name, verdict)
    if notes.status == "running":
        notes.status, notes.stage = "done", ""
    notes.save(job.folder)


def _prepare(job: AssetJob, notes: AssetNotes) -> tuple[Mesh, Topology]:
    """Run the stages that all products share."""
    mesh = read_mesh(job, notes)
    with _stage(job, notes, "topology"):
        topology = build_topology(mesh, job.config.topology)
        notes.row["sign_path"] = topology.sign_path
        notes.numbers |= topology.numbers
        if job.config.run == "build":  # screening measures the same; splits are decided once
            signatures = shape_signatures(mesh, topology)
            notes.row |= {name: moments.hex() for name, moments in signatures.items()}
    return mesh, topology


def read_mesh(job: AssetJob, notes: AssetNotes) -> Mesh:
    """Run the stages up to the normalised mesh.

    Args:
        job: The asset, its source and the options. The products do not matter.
        notes: They take the stage, its duration, and what was measured.

    Raises:
        Reject: If a rule of these stages rejects the asset.
    """
    record, cfg = job.record, job.config
    with _stage(job, notes, "metadata"):
        filter_metadata(record, cfg.filter, cfg.load.blender)
    with _stage(job, notes, "fetch"):
        scratch = job.folder / "input"
        scratch.mkdir()
        assert job.source is not None
        try:
            path = job.source.materialize(record, scratch)
            notes.row["sha256"] = sha256_of(path)
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
            raise Reject("file_not_readable", error=type(error).__name__) from error
        if record.sha256 not in (None, notes.row["sha256"]):
            raise Reject("wrong_sha256", expected=record.sha256)
    with _stage(job, notes, "file"):
        notes.numbers |= filter_file(path, cfg.filter)
    with _stage(job, notes, "load"):
        root = side_file_root(job.source, path, scratch)
        mesh, report = load_with_report(path, cfg.load, up=cfg.up, root=root)
        notes.row |= {"up_axis": report.up_axis, "up_origin": report.up_origin}
        visibility = WarningLog()
        try:
            mesh, translucent_share = keep_visible(mesh, visibility)
        finally:
            warnings = sorted((*report.warnings, *visibility.items()), key=lambda item: item.code)
            if warnings:
                notes.row["warnings"] = [warning.code for warning in warnings]
                notes.numbers["load_warnings"] = [str(warning) for warning in warnings]
        notes.numbers["translucent_share"] = translucent_share
        filter_warnings(warnings, cfg.filter)
        filter_share("translucent", translucent_share, cfg.filter)
    with _stage(job, notes, "normalize"):
        mesh = normalize(mesh, cfg.normalize)
        notes.row |= {"center": list(mesh.center), "scale": mesh.scale}
    with _stage(job, notes, "geometry"):
        notes.row |= filter_geometry(mesh, cfg.filter)
    return mesh


def _make_product(
    job: AssetJob, product: Product, mesh: Mesh, topology: Topology, notes: AssetNotes
) -> dict[str, Any]:
    """Write one product's files. Return its counts and the device or renderer that made it."""
    folder = job.folder / str(product)
    folder.mkdir()
    if product.kind == "screen":
        save_metrics(folder, compute_metrics(mesh, topology, job.config.screen))
        return {}
    if product.kind == "sdf":
        bricks = compute_bricks(topology, product.resolution, job.config.device)
        share = thin_share(topology, bricks)
        notes.numbers[thin_share_name(product.resolution)] = share
        filter_share("too_thin", share, job.config.filter)
        save_bricks(folder, bricks)
        return {"tokens": len(bricks.cells), "device": sdf_cuda.device_name(job.config.device)}
    cfg, uid = job.config.render, job.record.uid
    with on_gpu(job.gpu):
        if product.kind == TRANSFORMS:
            cameras = view_cameras(mesh, uid, cfg)
            # the files of the renders, if both tar files are unpacked in one directory
            files = [f"../{view_key(uid, view)}.{cfg.format}" for view in range(cfg.views)]
            content = transforms_of(cameras, cfg.image_size, files)
            (folder / MEMBER).write_bytes(dump_transforms(content))
        else:
            extension = product.extension(cfg.format)
            for image, meta in _encoded_views(job, product, mesh):
                save_view(folder, uid, meta["view"], image, meta, extension)
        return {"views": cfg.views, "renderer": renderer_string()}


def _encoded_views(
    job: AssetJob, product: Product, mesh: Mesh
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the encoded file of each view and the content of its json."""
    cfg, uid = job.config.render, job.record.uid
    if product.kind != "renders":
        yield from surface_views(mesh, uid, cfg, product.kind)
        return
    for view in render_views(mesh, uid, cfg, job.config.environment):
        yield encode(view, cfg.format), view.meta


def save_bricks(folder: Path, bricks: Bricks) -> None:
    """Write one file per array.

    The files are written without np.save, which hides the errno of a full disk.
    """
    for member, name in BRICK_ARRAYS.items():
        (folder / f"{name}.bin").write_bytes(np.ascontiguousarray(getattr(bricks, member)).data)


def load_bricks(folder: Path, resolution: int) -> Bricks:
    """Map the arrays that `save_bricks` wrote.

    Args:
        folder: The directory with one file per array.
        resolution: Grid points along one side.
    """
    row_shapes = {
        "cells": (np.int16, 3),
        "values": (np.float16, CELL_SIDE**3),
        "sharp": (np.uint8, CELL_SIDE**3 // 8),
    }
    arrays: dict[str, Any] = {}
    for member, (dtype, width) in row_shapes.items():
        array = np.memmap(folder / f"{BRICK_ARRAYS[member]}.bin", dtype, mode="r")
        arrays[member] = array.reshape(-1, width)
    return Bricks(resolution=resolution, **arrays)


def warm_up() -> None:
    """Compile all numba functions by processing an open box with a loose sheet.

    A process that forks children calls this first, so that the children find compiled code. The
    renderer is imported but not started, because a graphics context does not survive a fork.
    """
    corners = np.stack(np.meshgrid(*[[-0.4, 0.4]] * 3, indexing="ij"), axis=-1).reshape(8, 3)
    sides = np.array([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4]])
    sheet = np.array([[-0.2, 0.45, 0.0], [0.2, 0.45, 0.0], [0.0, 0.45, 0.2]])
    triangles = [sides[:, [0, 1, 2]], sides[:, [0, 2, 3]], [[8, 9, 10]]]
    faces = np.concatenate(triangles).astype(np.int32)
    mesh = Mesh(vertices=np.concatenate([corners, sheet]), faces=faces)
    filter_geometry(mesh, BuildConfig().filter)
    compute_bricks(build_topology(mesh, TopologyConfig(resolution=64)), 64)
    visible_parts.warm_up()
    importlib.import_module("moderngl")


def warm_up_cuda() -> None:
    """Compile all numba functions and import torch and the CUDA kernels.

    CUDA itself is not started, because it does not survive a fork.
    """
    warm_up()
    sdf_cuda.warm_up()


@contextmanager
def _stage(job: AssetJob, notes: AssetNotes, name: str) -> Iterator[None]:
    """Time a stage and save the notes before it, so that they name it if the process crashes."""
    started = time.perf_counter()
    if notes.status != "rejected":
        notes.stage = name
    notes.save(job.folder)
    try:
        yield
    finally:
        notes.seconds[name] = time.perf_counter() - started
