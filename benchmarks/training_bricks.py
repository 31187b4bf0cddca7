"""The build that `python -m benchmarks.training` trains on: packed meshes, and bricks of them."""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.training_config import (
    HELD_OUT,
    LEFT_OUT,
    PROCEDURAL,
    TIMED_MESHES,
    BrickBuild,
    Geometry,
)
from pipeline.core.files import write_atomically
from pipeline.core.hashing import make_uid
from pipeline.core.product import Product
from pipeline.core.schema import Bricks, Mesh
from pipeline.geometry.config import TopologyConfig
from pipeline.geometry.sdf import compute_bricks
from pipeline.geometry.topology import build_topology
from pipeline.storage.layout import MANIFEST, manifest_path, marker_path, product_paths
from pipeline.storage.manifest import ManifestRow, write_manifest
from pipeline.storage.sdf_shard import write_sdf_shard

log = logging.getLogger(__name__)

SHARD = "000000"


def pack_geometry(cfg: Geometry) -> None:
    """Write the meshes as npz: `names`, and v<n> float32 [V, 3] and f<n> int32 [F, 3] of each."""
    from pipeline.core.errors import Reject
    from pipeline.mesh_io.config import LoadConfig, NormalizeConfig
    from pipeline.mesh_io.load import load
    from pipeline.mesh_io.normalize import normalize
    from pipeline.sources import open_source

    arrays: dict[str, Any] = {}
    names: list[str] = []
    for spec in (f"folder:{cfg.meshes}", "procedural"):
        source = open_source(spec)
        for record in source.records():
            name = (
                Path(record.url).name if spec.startswith("folder") else record.url.partition("-")[2]
            )
            if name in LEFT_OUT or (
                spec == "procedural" and (name not in PROCEDURAL or name in names)
            ):
                continue
            folder = cfg.out.with_suffix(".scratch") / record.uid
            folder.mkdir(parents=True, exist_ok=True)
            try:
                mesh = normalize(
                    load(source.materialize(record, folder), LoadConfig()), NormalizeConfig()
                )
            except Reject as verdict:
                log.info("%s: %s", name, verdict)
                continue
            arrays |= {
                f"v{len(names)}": mesh.vertices.astype(np.float32),
                f"f{len(names)}": mesh.faces,
            }
            names.append(name)
    np.savez_compressed(cfg.out, names=np.array(names), **arrays)
    log.info("%d meshes are packed in %s.", len(names), cfg.out)


def make_bricks(cfg: BrickBuild) -> None:
    """Write a committed build of one shard."""
    packed = np.load(cfg.geometry)
    names = packed["names"].tolist()
    jobs = [
        (name, packed[f"v{n}"], packed[f"f{n}"], _resolutions(cfg, name))
        for n, name in enumerate(names)
    ]
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(cfg.workers) as pool:
        made = dict(pool.imap_unordered(_bricks_of, sorted(jobs, key=lambda job: -len(job[2]))))
    rows = []
    for number, name in enumerate(names):
        split = "val" if name in (*HELD_OUT, *PROCEDURAL) else "train"
        source = "procedural" if name in PROCEDURAL else "folder"
        row = ManifestRow(
            uid=make_uid(source, name),
            url=name,
            status="done",
            tokens={r: len(bricks.cells) for r, bricks in made[name].items()},
            shard=SHARD,
            row=number,
            split=split,
        )
        rows.append(row)
    resolutions = sorted({r for bricks in made.values() for r in bricks})
    for resolution in resolutions:
        assets = [(row.uid, made[row.url][resolution]) for row in rows if resolution in row.tokens]
        path = cfg.out / product_paths(Product.sdf(resolution), SHARD)[0]
        path.parent.mkdir(parents=True)
        write_sdf_shard(path, resolution, assets, "benchmark")
    write_manifest(manifest_path(cfg.out, SHARD), rows, resolutions)
    for product in (MANIFEST, *map(Product.sdf, resolutions)):
        write_atomically(marker_path(cfg.out, SHARD, product), "{}")
    seconds = time.monotonic() - began
    log.info("%d assets at R = %s are built in %.0f s.", len(rows), resolutions, seconds)


def _resolutions(cfg: BrickBuild, name: str) -> tuple[int, ...]:
    return (
        (*cfg.resolutions, cfg.finest) if cfg.finest and name in TIMED_MESHES else cfg.resolutions
    )


def _bricks_of(
    job: tuple[str, np.ndarray, np.ndarray, Sequence[int]],
) -> tuple[str, dict[int, Bricks]]:
    name, vertices, faces, resolutions = job
    mesh = Mesh(vertices=vertices.astype(np.float64), faces=faces)
    topology = build_topology(mesh, TopologyConfig())
    return name, {resolution: compute_bricks(topology, resolution) for resolution in resolutions}
