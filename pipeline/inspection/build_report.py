"""The report of a build: one self-contained HTML page, written at its end or at any time."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import UserError
from pipeline.core.html import MESH_VIEWER, image_uri, render_page
from pipeline.core.product import Product, is_product_name
from pipeline.core.text import counted
from pipeline.curation.catalogue import read_funnel
from pipeline.curation.reasons import as_options, thresholds
from pipeline.inspection.config import ReportConfig
from pipeline.inspection.report_assets import asset_list
from pipeline.inspection.report_pictures import PICTURES, PictureJob
from pipeline.mesh_io.load_warnings import WARNING_CODES
from pipeline.orchestration.isolated_process import IsolatedProcess
from pipeline.orchestration.plan import Plan, read_plan
from pipeline.orchestration.progress import LINE_EVERY_S
from pipeline.storage.commit_marker import CommitMarker, read_marker
from pipeline.storage.layout import (
    CATALOGUE,
    MANIFEST,
    PLAN,
    PLAN_TABLE,
    list_commits,
    manifest_path,
    stats_path,
)
from pipeline.storage.locks import local_copy
from pipeline.storage.manifest import (
    ManifestRow,
    count_reasons,
    read_manifest,
    thin_share_name,
)
from pipeline.storage.remote import AnyStorePath, StorePath, write_file

log = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("build_report.html.j2")
SCRIPT = Path(__file__).with_name("build_report.js")  # of the list of assets
# The stages that an asset goes through once for all products, in order.
SHARED_STAGES = ("metadata", "fetch", "file", "load", "normalize", "geometry", "topology")
THIN_PERCENT = 5  # of the visible area; from here on an asset counts as partly too thin
WARNING_EXAMPLES = 3  # assets shown for each warning code
SOURCE_NAMES = (PLAN, PLAN_TABLE, "manifest", "stats", "shards")  # what is read
# The finest resolution of a picture. Extracting a surface at 1024 would take seconds.
PICTURE_RESOLUTION = 256
PICTURE_TIMEOUT_S = 600.0
PICTURE_MEMORY_BYTES = 8 * 10**9


@dataclass(frozen=True, kw_only=True)
class BuildContents:
    """What is committed in an output directory.

    Attributes:
        plan: The plan of the build.
        rows: The rows of all manifests, in the order of the plan.
        markers: The commit markers of all shards, by product.
        stats: The rows of all stats tables.
        open_shards: Number of shards that are not committed.
    """

    plan: Plan
    rows: list[ManifestRow]
    markers: dict[Product, list[CommitMarker]]
    stats: list[dict[str, Any]]
    open_shards: int


def write_report(out: AnyStorePath, options: ReportConfig | None = None) -> AnyStorePath:
    """Write the report of a build.

    Args:
        out: Output directory or URL of the build.
        options: Numbers of pictures and meshes. None takes the defaults.

    Returns:
        The path of the page, `out`/report/index.html.

    Raises:
        UserError: If `out` is not a build.
    """
    options = options or ReportConfig(directory=out)
    with local_copy(out, SOURCE_NAMES) as folder:
        build = read_build(folder)
    build = replace(build, plan=replace(build.plan, out=out))
    page = out / "report" / "index.html"
    resolutions, cameras = _resolutions(build), _cameras(build)
    assets = asset_list(
        build.plan,
        build.rows,
        resolutions=resolutions,
        picture_resolution=_picture_resolution(resolutions),
        cameras=cameras,
        options=options,
    )
    scripts = {"viewer_js": MESH_VIEWER, "report_js": SCRIPT}
    html = render_page(
        TEMPLATE,
        **summary(build),
        **contact_sheet(build, options.pictures),
        **assets,
        **{name: path.read_text(encoding="utf-8") for name, path in scripts.items()},
        human_bytes=human_bytes,
    )
    write_file(page, html.encode())
    return page


def read_build(out: Path) -> BuildContents:
    """Read the committed part of a build.

    Raises:
        UserError: If `out` is not a build, or a committed shard has no manifest or stats.
    """
    plan = read_plan(out)
    commits = list_commits(out)
    rows: list[ManifestRow] = []
    stats: list[dict[str, Any]] = []
    markers: dict[Product, list[CommitMarker]] = {}
    open_shards = 0
    for shard in plan.shards:
        if MANIFEST not in commits.get(shard, ()):
            open_shards += 1
            continue
        try:
            rows += read_manifest(manifest_path(out, shard))
            stats += pq.read_table(stats_path(out, shard)).to_pylist()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(
                f"{out} is not a complete build; copy its stats and manifest, too: {error}"
            ) from error
        for product in map(Product.parse, filter(is_product_name, commits[shard])):
            markers.setdefault(product, []).append(read_marker(out, shard, product))
    ordered = {product: markers[product] for product in sorted(markers)}
    return BuildContents(
        plan=plan, rows=rows, markers=ordered, stats=stats, open_shards=open_shards
    )


def summary(build: BuildContents) -> dict[str, Any]:
    """Return the template's variables for everything but the contact sheet."""
    out = build.plan.out
    info = build.plan.info
    all_markers = [marker for markers in build.markers.values() for marker in markers]
    sign_paths = Counter(row.sign_path for row in build.rows if row.sign_path)
    return {
        "name": out.resolve().name if isinstance(out, Path) else out.name,
        "info": info,
        "info_json": info.to_json().strip(),
        "assets": build.plan.assets,
        "shards": len(build.plan.shards),
        "open_shards": build.open_shards,
        "done": sum(row.status == "done" for row in build.rows),
        "tiles": tiles(build),
        "funnel": funnel_steps(build.rows, list(map(str, build.markers))),
        "reasons": reason_rows(build.rows, info.config),
        "warnings": warning_rows(build.rows),
        "axes": axis_rows(build.rows),
        "thin_percent": THIN_PERCENT,
        "screening": [
            {**row, "thresholds": as_options(row["thresholds"])}
            for row in _screening_funnel(out / CATALOGUE)
        ],
        "products": [
            product_row(product, markers, build.rows) for product, markers in build.markers.items()
        ],
        "renderers": sorted({name for marker in all_markers for name in marker.renderers or ()}),
        "sign_paths": sign_paths.most_common(),
        "costs": cost_rows(build.stats),
        "hosts": sorted({row["host"] for row in build.stats}),
        "product_configs": [
            (str(product), json.dumps(markers[0].config, indent=1))
            for product, markers in build.markers.items()
        ],
    }


def tiles(build: BuildContents) -> list[dict[str, str]]:
    """Return the numbers at the top of the page, each with its label and its CSS class."""
    status = Counter(row.status for row in build.rows)
    all_markers = [marker for markers in build.markers.values() for marker in markers]
    views = sum(
        marker.counts.get("views", 0)
        for product, markers in build.markers.items()
        for marker in markers
        if product.kind == "renders"
    )
    stored_bytes = sum(marker.bytes for marker in all_markers)
    validation = sum(row.split == "val" and row.status == "done" for row in build.rows)
    skipped = sum(build.plan.info.skipped_files.values())
    rejected = status["rejected"]
    failed = status["failed"]
    values = [
        ("good", f"{status['done']:,}", "assets done"),
        ("warn" if rejected else "", f"{rejected:,}", "rejected"),
        ("bad" if failed else "", f"{failed:,}", "failed"),
        ("", f"{views:,}", "renders"),
        ("", human_bytes(stored_bytes), "stored"),
        ("", f"{validation:,}", "done, for validation"),
        ("", f"{skipped:,}", "files of other kinds"),
    ]
    return [{"kind": kind, "value": value, "label": label} for kind, value, label in values]


def reason_rows(rows: Sequence[ManifestRow], options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each reason for which assets were rejected or failed.

    Args:
        rows: The rows of all manifests.
        options: The configuration of the build as in plan.json.
    """
    # The first asset of each reason is shown as an example.
    examples = {(row.status, row.stage, row.reason): row.url for row in reversed(rows)}
    return [
        {
            "status": status,
            "stage": stage,
            "reason": reason,
            "count": count,
            "example": examples[status, stage, reason],
            "thresholds": as_options(thresholds(reason, options)),
        }
        for status, stage, reason, count in count_reasons(rows)
        if status != "done"
    ]


def warning_rows(rows: Sequence[ManifestRow]) -> list[dict[str, Any]]:
    """Return a row for each warning code of the mesh readers, the most frequent first.

    Args:
        rows: The rows of all manifests.
    """
    assets = Counter(code for row in rows for code in row.warnings)
    examples: dict[str, list[str]] = {}
    for row in rows:
        for line in row.numbers.get("load_warnings", ()):
            code = line.partition(":")[0].partition(" ")[0]
            lines = examples.setdefault(code, [])
            if len(lines) < WARNING_EXAMPLES:
                lines.append(f"{row.url} ({line})")
    return [
        {
            "code": code,
            "meaning": WARNING_CODES.get(code, "This code is not known to this version."),
            "count": count,
            "examples": examples.get(code, []),
        }
        for code, count in sorted(assets.items(), key=lambda item: (-item[1], item[0]))
    ]


def axis_rows(rows: Sequence[ManifestRow]) -> list[tuple[str, str, str, int]]:
    """Return (format, up axis, origin of the axis, number of assets), sorted."""
    counts = Counter(
        (row.format, row.up_axis, row.up_origin or "") for row in rows if row.up_axis is not None
    )
    return [(*key, count) for key, count in sorted(counts.items())]


def _screening_funnel(catalogue: StorePath) -> list[dict[str, Any]]:
    """Return why assets are not in the catalogue of a ranked build."""
    return read_funnel(catalogue) if catalogue.exists() else []


def funnel_steps(rows: Sequence[ManifestRow], products: Iterable[str]) -> list[dict[str, Any]]:
    """Return how many assets remain after each stage at which one was lost, and each product."""
    lost = Counter(row.stage for row in rows if row.status != "done")
    left = len(rows)
    steps = [{"stage": "seen", "left": left, "lost": 0, "percent": 100.0}]
    order = [*SHARED_STAGES, *products]
    for stage in [*order, *sorted(set(lost) - set(order))]:
        left -= lost[stage]
        if lost[stage] or stage in products:
            percent = round(100 * left / max(len(rows), 1), 2)
            steps.append({"stage": stage, "left": left, "lost": lost[stage], "percent": percent})
    return steps


def product_row(
    product: Product, markers: Sequence[CommitMarker], rows: Sequence[ManifestRow]
) -> dict[str, str]:
    """Return the counts and sizes of one product over all its shards, as text."""
    total = sum(marker.bytes for marker in markers)
    assets = sum(marker.counts["assets"] for marker in markers)
    counts = []
    if product.kind == "sdf":
        counts = [row.tokens.get(product.resolution) for row in rows]
    tokens = [count for count in counts if count is not None]
    thin = ""
    if product.kind == "sdf":
        name = thin_share_name(product.resolution)
        shares = [row.numbers[name] for row in rows if name in row.numbers]
        thin = f"{sum(100 * share > THIN_PERCENT for share in shares):,} of {len(shares):,}"
    return {
        "name": str(product),
        "assets": f"{assets:,}",
        "mean": f"{np.mean(tokens):,.0f}" if tokens else "",
        "median": f"{np.median(tokens):,.0f}" if tokens else "",
        "max": f"{max(tokens):,}" if tokens else "",
        "size": human_bytes(total),
        "cell": f"{total / sum(tokens):.0f} B" if tokens else "",
        "each": human_bytes(total / assets) if assets else "",
        "thin": thin,
    }


def cost_rows(stats: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean, median, 95th percentile, maximum and sum of the seconds of each stage.

    Rows for whole assets and for peak memory follow.
    """
    by_stage: dict[str, list[float]] = {}
    for row in stats:
        for stage, seconds in json.loads(row["stage_seconds"]).items():
            by_stage.setdefault(stage, []).append(seconds)
    order = {stage: number for number, stage in enumerate(SHARED_STAGES)}
    shared = sorted(stage for stage in by_stage if not is_product_name(stage))
    made = sorted(Product.parse(stage) for stage in by_stage if is_product_name(stage))
    stages = [*sorted(shared, key=lambda stage: order.get(stage, len(order))), *map(str, made)]
    costs = [_cost_row(stage, by_stage[stage], human_seconds) for stage in stages]
    if stats:
        costs.append(_cost_row("whole asset", [row["seconds"] for row in stats], human_seconds))
        memory = _cost_row("peak memory", [row["peak_rss_bytes"] for row in stats], human_bytes)
        costs.append({**memory, "values": [*memory["values"][:-1], ""]})  # no sum of peaks
    return costs


def _cost_row(name: str, values: Sequence[float], show: Callable[[float], str]) -> dict[str, Any]:
    numbers = (
        float(np.mean(values)),
        float(np.median(values)),
        float(np.percentile(values, 95)),
        max(values),
        sum(values),
    )
    return {"name": name, "count": len(values), "values": [show(number) for number in numbers]}


def contact_sheet(build: BuildContents, limit: int) -> dict[str, Any]:
    """Return the template's variables for the pictures of up to `limit` finished assets.

    The assets are spread over the build. A child process draws the pictures, because the renderer
    may crash.
    """
    resolutions, cameras = _resolutions(build), _cameras(build)
    resolution = _picture_resolution(resolutions)
    done = [row for row in build.rows if row.status == "done"]
    if resolution is None or cameras is None or not done or limit < 1:
        return {"cards": [], "picture_resolution": 0, "no_pictures": "nothing is finished"}
    count = min(limit, len(done))
    chosen = [done[i * len(done) // count] for i in range(count)]
    folder = Path(tempfile.mkdtemp(prefix="report-"))
    child = IsolatedProcess("pipeline.inspection.report_pictures:warm_up")
    try:
        job = PictureJob(
            out=build.plan.out,
            assets=tuple((row.shard, row.uid) for row in chosen),
            resolution=resolution,
            cameras=cameras,
            folder=folder,
        )
        with drawing_progress(folder, len(chosen)):
            end = child.call(
                "pipeline.inspection.report_pictures:draw",
                job,
                log=folder / "log.txt",
                timeout_s=PICTURE_TIMEOUT_S,
                memory_bytes=PICTURE_MEMORY_BYTES,
            )
        if end.reason:
            log.warning(
                "The report lacks pictures, because drawing failed: %s %s", end.reason, end.detail
            )
        cards = [card for row in chosen if (card := _card(folder, row, resolutions)) is not None]
    finally:
        child.close()
        shutil.rmtree(folder)
    return {
        "cards": cards,
        "picture_resolution": resolution,
        "no_pictures": f"drawing them failed: {end.reason} {end.detail}".strip(),
    }


def _resolutions(build: BuildContents) -> list[int]:
    return [product.resolution for product in build.markers if product.kind == "sdf"]


def _cameras(build: BuildContents) -> str | None:
    return next((p.variant for p in build.markers if p.kind == "renders"), None)


def _picture_resolution(resolutions: Sequence[int]) -> int | None:
    """Return the resolution of the bricks that the page shows. None if there are none."""
    fine_enough = [resolution for resolution in resolutions if resolution <= PICTURE_RESOLUTION]
    return max(fine_enough, default=min(resolutions, default=None))


@contextmanager
def drawing_progress(folder: Path, total: int, every_s: float = LINE_EVERY_S) -> Iterator[None]:
    """Log how many assets another process has drawn, until the block ends.

    Args:
        folder: Directory of the pictures.
        total: Number of assets to draw.
        every_s: Seconds between two lines.
    """
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(every_s):
            drawn = sum(1 for _ in folder.glob(f"*-{PICTURES[-1]}.webp"))
            log.info("The report has pictures of %d of %s.", drawn, counted(total, "asset"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _card(folder: Path, row: ManifestRow, resolutions: Iterable[int]) -> dict[str, Any] | None:
    """Return the card of one asset, or None if its pictures were not drawn."""
    files = {kind: folder / f"{row.uid}-{kind}.webp" for kind in PICTURES}
    if not all(file.exists() for file in files.values()):
        return None
    tokens = [
        f"{count:,} tokens at {resolution}"
        for resolution in resolutions
        if (count := row.tokens.get(resolution)) is not None
    ]
    return {
        "uid": row.uid,
        "url": row.url,
        "faces": f"{row.faces:,}",
        "sign_path": row.sign_path,
        "tokens": ", ".join(tokens),
        "images": [(kind, image_uri(file.read_bytes(), "webp")) for kind, file in files.items()],
    }


def human_bytes(count: float) -> str:
    """Return a number of bytes with three digits and a unit: 1234567 is "1.23 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def human_seconds(seconds: float) -> str:
    """Return a duration with three digits in milliseconds, seconds or hours."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds / 3600:.3g} h"
