"""The report's list of assets: its filters, histograms, and the meshes of its 3D view."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError
from pipeline.core.html import image_uri
from pipeline.curation.catalogue import read_columns
from pipeline.inspection.config import ReportConfig
from pipeline.inspection.report_meshes import NOTES, STARTED, MeshJob, ShownAsset
from pipeline.orchestration.isolated_process import IsolatedProcess
from pipeline.orchestration.plan import Plan
from pipeline.orchestration.recorded_options import build_options
from pipeline.sources import Source, open_source
from pipeline.storage.manifest import ManifestRow

log = logging.getLogger(__name__)

MAX_ROWS = 3000  # assets in the list
LOST_SHARE = 1 / 4  # of the meshes that may belong to assets that are not done
UNREAD_STAGES = ("metadata", "fetch", "file", "load")  # an asset that ended here has no mesh
LOCAL_SCHEMES = ("procedural", "folder", "shapenet")
TIMEOUT_S = 1800.0  # of all meshes
MEMORY_BYTES = 8 * 10**9
CATALOGUE_COLUMNS = ("uid", "url", "stage", "reason", "score", "keep", "licence", "source", "faces")


def asset_list(
    plan: Plan,
    rows: Sequence[ManifestRow],
    *,
    resolutions: Sequence[int],
    picture_resolution: int | None,
    cameras: str | None,
    options: ReportConfig,
) -> dict[str, Any]:
    """Return the template's variables for the list of assets and its 3D view.

    Args:
        plan: The plan of the build.
        rows: The rows of all manifests.
        resolutions: Resolutions of the bricks.
        picture_resolution: Resolution of the bricks that are shown, None if there are none.
        cameras: Camera set of the renders, None if there are none.
        options: Numbers of meshes and faces.
    """
    entries = _entries(plan, rows, max(resolutions, default=None))
    chosen = choose_shown(rows, options.meshes)
    meshes: dict[str, dict[str, Any]] = {}
    note = ""
    if chosen:
        sources, note = _sources(plan, options)
        meshes = _meshes(plan, chosen, sources, picture_resolution, cameras, options)
    for entry in entries:
        if shown := meshes.get(entry["uid"]):
            entry |= {name: shown[name] for name in ("thumbnail", "notes") if name in shown}
    shown_first = sorted(entries, key=lambda entry: entry["uid"] not in meshes)
    listed = {entry["uid"] for entry in shown_first[:MAX_ROWS]}
    payloads = {
        f"{uid}/{kind}": content[kind]
        for uid, content in meshes.items()
        for kind in ("original", "bricks")
        if kind in content and uid in listed
    }
    total = sum(map(len, payloads.values())) + sum(
        len(content.get("thumbnail", "")) for content in meshes.values()
    )
    return {
        "assets_json": _script_json([entry for entry in entries if entry["uid"] in listed]),
        "all_entries": len(entries),
        "listed_entries": len(listed),
        "payloads": payloads,
        "shown": len(meshes),
        "shown_done": sum(row.status == "done" and row.uid in meshes for row in rows),
        "bytes_each": total / len(meshes) if meshes else 0,
        "bytes_all": total,
        "mesh_faces": options.mesh_faces,
        "mesh_resolution": picture_resolution,
        "originals_note": note,
    }


def _script_json(content: object) -> str:
    """Return JSON that may stand inside a script element."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def choose_shown(rows: Sequence[ManifestRow], limit: int) -> list[ManifestRow]:
    """Choose the assets with a 3D view, spread over the build.

    Assets that were read but rejected or failed later get up to a quarter of them.
    """
    done = [row for row in rows if row.status == "done"]
    lost = [row for row in rows if row.status != "done" and row.stage not in UNREAD_STAGES]
    few = min(len(lost), max(int(limit * LOST_SHARE), limit - len(done)))
    return [*_spread(done, limit - few), *_spread(lost, few)]


def _spread(rows: Sequence[ManifestRow], count: int) -> list[ManifestRow]:
    count = max(0, min(count, len(rows)))
    return [rows[n * len(rows) // count] for n in range(count)]


def _entries(
    plan: Plan, rows: Sequence[ManifestRow], resolution: int | None
) -> list[dict[str, Any]]:
    """Return what the list says about each asset, those of the catalogue included."""
    scores = read_columns(plan.out, CATALOGUE_COLUMNS)
    entries = [
        {
            "uid": row.uid,
            "url": row.url,
            "status": row.status,
            "stage": row.stage,
            "reason": row.reason,
            "warnings": list(row.warnings),
            "licence": row.licence,
            "split": row.split,
            "sign_path": row.sign_path,
            "faces": row.faces,
            "tokens": row.tokens.get(resolution) if resolution else None,
            "score": scores.get(row.uid, {}).get("score"),
        }
        for row in rows
    ]
    known = {row.uid for row in rows}
    entries += [
        {
            "uid": uid,
            "url": row["url"],
            "status": "not kept",
            "stage": row["stage"],
            "reason": row["reason"],
            "warnings": [],
            "licence": row["licence"],
            "split": "",
            "sign_path": None,
            "faces": row.get("faces"),
            "tokens": None,
            "score": row["score"],
        }
        for uid, row in scores.items()
        if uid not in known and not row["keep"]
    ]
    return entries


def _sources(plan: Plan, options: ReportConfig) -> tuple[dict[str, Source], str]:
    """Open the sources that originals are read from. Return them and what the page says of it."""
    if options.originals == "none":
        return {}, "Originals were not asked for (--originals none)."
    specs = [
        spec
        for spec in dict.fromkeys(plan.info.config["source"])
        if options.originals == "all" or spec.partition(":")[0] in LOCAL_SCHEMES
    ]
    if not specs:
        return {}, "Originals are read again from their source only with --originals all."
    sources: dict[str, Source] = {}
    for spec in specs:
        try:
            source = open_source(spec)
        except UserError as error:
            return sources, f"Originals of {spec} cannot be read: {error}."
        sources[source.name] = source
    return sources, ""


def _meshes(
    plan: Plan,
    chosen: Sequence[ManifestRow],
    sources: dict[str, Source],
    resolution: int | None,
    cameras: str | None,
    options: ReportConfig,
) -> dict[str, dict[str, Any]]:
    """Return the encoded meshes, the thumbnail and the notes of each chosen asset."""
    config = None
    try:
        config = build_options(plan)
    except UserError as error:
        log.warning("The report lacks the originals: %s", error)
    records = {
        record.uid: record
        for shard in sorted({row.shard for row in chosen})
        for record in plan.records(shard)
    }
    assets = tuple(
        ShownAsset(
            record=records[row.uid],
            shard=row.shard,
            sha256=row.sha256,
            source=sources.get(row.source),
            has_products=row.status == "done",
        )
        for row in chosen
    )
    folder = Path(tempfile.mkdtemp(prefix="report-"))
    job = MeshJob(
        out=plan.out,
        assets=assets,
        config=config,
        resolution=resolution,
        cameras=cameras,
        faces=options.mesh_faces,
        folder=folder,
    )
    try:
        _run(job)
        return {asset.record.uid: _read(folder / asset.record.uid) for asset in assets}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(job: MeshJob) -> None:
    """Make the meshes in a child process. One that dies is followed by another, without its asset.

    The page says of an asset whose process died what happened.
    """
    child = IsolatedProcess("pipeline.inspection.report_meshes:warm_up")
    try:
        while True:
            end = child.call(
                "pipeline.inspection.report_meshes:make_meshes",
                job,
                log=job.folder / "log.txt",
                timeout_s=TIMEOUT_S,
                memory_bytes=MEMORY_BYTES,
            )
            if not end.reason:
                return
            folders = [job.folder / asset.record.uid for asset in job.assets]
            cut = [f for f in folders if (f / STARTED).exists() and not (f / NOTES).exists()]
            why = f"{end.reason} {end.detail}".strip()
            log.warning("The report lacks a mesh, because its process ended: %s", why)
            if not cut:
                return
            for folder in cut:
                (folder / NOTES).write_text(json.dumps({"failed": why}), encoding="utf-8")
    finally:
        child.close()


def _read(folder: Path) -> dict[str, Any]:
    """Return what the child wrote for one asset, encoded for the page."""
    path = folder / NOTES
    content: dict[str, Any] = {}
    notes = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content["notes"] = notes
    for kind in ("original", "bricks"):
        if kind in notes:
            content[kind] = b64encode((folder / f"{kind}.bin").read_bytes()).decode()
    if (folder / "thumbnail.webp").exists():
        content["thumbnail"] = image_uri((folder / "thumbnail.webp").read_bytes(), "webp")
    return content
