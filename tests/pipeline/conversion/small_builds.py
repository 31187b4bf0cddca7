"""Builds of mesh files with manifests and renders but without bricks, made without Ray."""

from pathlib import Path

import numpy as np

from pipeline.config import BuildConfig
from pipeline.core.cameras import sample_camera
from pipeline.core.hashing import sha256_of, split_of
from pipeline.core.image_codec import encode
from pipeline.core.product import Product
from pipeline.core.schema import View
from pipeline.mesh_io.load import load
from pipeline.mesh_io.normalize import normalize
from pipeline.orchestration.plan import make_plan
from pipeline.sources.folder import FolderSource
from pipeline.storage.layout import MANIFEST, manifest_path, marker_path, product_paths
from pipeline.storage.manifest import ManifestRow, write_manifest
from pipeline.storage.render_shard import write_render_shard

VIEWS = 3
SIDE = 8  # of an image, in pixels


def make_build(out: Path, folder: Path) -> list[ManifestRow]:
    """Write a build of the mesh files of a folder and return the rows of its manifest."""
    cfg = BuildConfig(
        out=out, source=(f"folder:{folder}",), resolutions=(64,), shard_size=64, val_percent=40
    )
    plan = make_plan(cfg, [FolderSource(root=folder)])
    (shard,) = plan.shards
    rows, entries = [], []
    for number, record in enumerate(plan.records(shard)):
        mesh = normalize(load(folder / record.url, cfg.load), cfg.normalize)
        rows.append(
            ManifestRow(
                uid=record.uid,
                source=record.source,
                url=record.url,
                licence=record.licence,
                sha256=sha256_of(folder / record.url),
                format=record.format,
                status="done",
                center=mesh.center,
                scale=mesh.scale,
                shard=shard,
                row=number,
                split=split_of(record.uid, cfg.val_percent),
                tokens={64: 1},
            )
        )
        entries.append((record.uid, [_view(record.uid, view) for view in range(VIEWS)]))
    write_manifest(manifest_path(out, shard), rows, [64])
    renders = Product.renders("paper")
    write_render_shard(out / product_paths(renders, shard)[0], entries)
    for name in (MANIFEST, Product.sdf(64), renders):
        path = marker_path(out, shard, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n", encoding="utf-8")
    return rows


def _view(uid, view):
    rgba = np.full((SIDE, SIDE, 4), 10 + view, np.uint8)
    size = {"width": SIDE, "height": SIDE}
    meta = {"uid": uid, "view": view, **sample_camera(uid, view).meta(), **size}
    return encode(View(rgba=rgba, meta=meta)), meta
