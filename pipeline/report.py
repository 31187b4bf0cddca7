"""`python -m pipeline.report DIR`: one self-contained HTML page about a build, written at its end or at any time."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from pipeline.core.cli import command, parse
from pipeline.core.errors import UserError
from pipeline.core.html import image_uri, render_page
from pipeline.core.product import Product, is_product_name, tokens_column
from pipeline.curation.rank import thresholds
from pipeline.orchestration.catalogue import CATALOGUE, read_funnel
from pipeline.orchestration.commit import MANIFEST, manifest_path, marker_path, stats_path
from pipeline.orchestration.isolated_process import Isolated
from pipeline.orchestration.manifest import funnel, read_manifest
from pipeline.orchestration.plan import Plan, read_plan
from pipeline.report_pictures import PICTURES, PictureJob
from pipeline.storage.config import PathOrUrl
from pipeline.storage.locks import local_copy
from pipeline.storage.remote import AnyStorePath, StorePath, check_exists, write_file

log = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("report.html.j2")
STAGES = (
    "metadata",
    "fetch",
    "file",
    "load",
    "normalize",
    "geometry",
    "topology",
)  # what all products share
READ = ("plan.json", "plan.parquet", "manifest", "stats", "shards")
PICTURE_RESOLUTION = (
    256  # the finest that a picture needs; extracting a surface at 1024 takes seconds
)
PICTURE_TIMEOUT_S, PICTURE_BYTES = 600.0, 8 * 10**9


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write DIR/report/index.html about a build, finished or not."""

    directory: Annotated[PathOrUrl, tyro.conf.Positional]  # the build's output directory
    pictures: int = 24  # assets on the contact sheet


@dataclass(frozen=True, kw_only=True)
class Build:
    """What is committed in an output directory."""

    plan: Plan
    rows: list[dict[str, Any]]  # of all manifests, in plan order
    markers: dict[Product, list[dict[str, Any]]]  # product -> its shards' markers
    stats: list[dict[str, Any]]
    open_shards: int


def write_report(out: AnyStorePath, pictures: int = 24) -> AnyStorePath:
    """Write the page and return where it is. UserError if `out` is not a build."""
    with local_copy(out, READ) as here:
        build = read_build(here)
    build = replace(build, plan=replace(build.plan, out=out))
    page = out / "report" / "index.html"
    html = render_page(TEMPLATE, **summary(build), **contact_sheet(build, pictures))
    write_file(page, html.encode())
    return page


def read_build(out: Path) -> Build:
    """The committed part of a build. UserError if `out` is not one, or is one without its manifest or stats."""
    plan = read_plan(out)
    rows, stats, open_shards = [], [], 0
    markers: dict[Product, list[dict[str, Any]]] = {}
    for shard in plan.shards:
        if not marker_path(out, shard, MANIFEST).exists():
            open_shards += 1
            continue
        try:
            rows += read_manifest(manifest_path(out, shard))
            stats += pq.read_table(stats_path(out, shard)).to_pylist()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(
                f"{out} is not a whole build, copy its stats and manifest, too: {error}"
            ) from error
        for path in (out / "shards" / shard).glob("*.json"):
            if is_product_name(path.stem):
                markers.setdefault(Product.parse(path.stem), []).append(
                    json.loads(path.read_text())
                )
    ordered = {product: markers[product] for product in sorted(markers)}
    return Build(plan=plan, rows=rows, markers=ordered, stats=stats, open_shards=open_shards)


def summary(build: Build) -> dict[str, Any]:
    """Everything on the page but the contact sheet."""
    out, info, rows = build.plan.out, build.plan.info, build.rows
    status = Counter(row["status"] for row in rows)
    total_bytes = sum(marker["bytes"] for markers in build.markers.values() for marker in markers)
    views = sum(
        marker["counts"].get("views", 0) for markers in build.markers.values() for marker in markers
    )
    tiles = [
        {"kind": "good", "value": f"{status['done']:,}", "label": "assets done"},
        {
            "kind": "warn" * bool(status["rejected"]),
            "value": f"{status['rejected']:,}",
            "label": "rejected",
        },
        {
            "kind": "bad" * bool(status["failed"]),
            "value": f"{status['failed']:,}",
            "label": "failed",
        },
        {"kind": "", "value": f"{views:,}", "label": "renders"},
        {"kind": "", "value": human_bytes(total_bytes), "label": "stored"},
        {
            "kind": "",
            "value": f"{sum(row['split'] == 'val' and row['status'] == 'done' for row in rows):,}",
            "label": "done, for validation",
        },
        {
            "kind": "",
            "value": f"{sum(info['skipped_files'].values()):,}",
            "label": "files of other kinds",
        },
    ]
    examples = {(row["status"], row["stage"], row["reason"]): row["url"] for row in reversed(rows)}
    return {
        "name": out.resolve().name if isinstance(out, Path) else out.name,
        "info": info,
        "info_json": json.dumps(info, indent=1),
        "assets": build.plan.assets,
        "shards": len(build.plan.shards),
        "open_shards": build.open_shards,
        "done": status["done"],
        "tiles": tiles,
        "funnel": funnel_steps(rows, list(map(str, build.markers))),
        "reasons": [
            {
                **{
                    "status": s,
                    "stage": stage,
                    "reason": reason,
                    "count": n,
                    "example": examples[s, stage, reason],
                },
                "thresholds": _spelled(thresholds(reason, info["config"])),
            }
            for s, stage, reason, n in funnel(rows)
            if s != "done"
        ],
        "screening": [
            {**row, "thresholds": _spelled(row["thresholds"])}
            for row in _screening(out / CATALOGUE)
        ],
        "products": [
            product_row(product, markers, rows) for product, markers in build.markers.items()
        ],
        "renderers": sorted(
            {
                r
                for markers in build.markers.values()
                for m in markers
                for r in m.get("renderers", [])
            }
        ),
        "sign_paths": Counter(row["sign_path"] for row in rows if row["sign_path"]).most_common(),
        "costs": cost_rows(build.stats),
        "hosts": sorted({row["host"] for row in build.stats}),
        "product_configs": [
            (str(product), json.dumps(markers[0]["config"], indent=1))
            for product, markers in build.markers.items()
        ],
    }


def _screening(catalogue: StorePath) -> list[dict[str, Any]]:
    """Why assets are not in the catalogue of a ranked build."""
    return read_funnel(catalogue) if catalogue.exists() else []


def _spelled(options: dict[str, Any]) -> str:
    """Options as on a command line, long lists cut short."""
    words = []
    for value in options.values():
        more = isinstance(value, list) and len(value) > 6
        words.append(
            " ".join(map(str, value[:6])) + " ..." * more if isinstance(value, list) else value
        )
    return ", ".join(f"--{name.replace('_', '-')} {word}" for name, word in zip(options, words))


def funnel_steps(rows: Sequence[dict[str, Any]], products: Iterable[str]) -> list[dict[str, Any]]:
    """How many assets are left after every stage at which one was turned away."""
    lost = Counter(row["stage"] for row in rows if row["status"] != "done")
    left = len(rows)
    steps = [{"stage": "seen", "left": left, "lost": 0, "percent": 100.0}]
    order = [*STAGES, *products]
    for stage in [*order, *sorted(set(lost) - set(order))]:
        left -= lost[stage]
        if lost[stage] or stage in products:
            percent = round(100 * left / max(len(rows), 1), 2)
            steps.append({"stage": stage, "left": left, "lost": lost[stage], "percent": percent})
    return steps


def product_row(
    product: Product, markers: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> dict[str, str]:
    """Counts and sizes of one product over all its shards."""
    total = sum(marker["bytes"] for marker in markers)
    assets = sum(marker["counts"]["assets"] for marker in markers)
    column = tokens_column(product.resolution) if product.kind == "sdf" else ""
    tokens = [row[column] for row in rows if row.get(column) is not None]
    cells = (
        (f"{np.mean(tokens):,.0f}", f"{np.median(tokens):,.0f}", f"{max(tokens):,}")
        if tokens
        else ("",) * 3
    )
    return {
        "name": str(product),
        "assets": f"{assets:,}",
        **dict(zip(("mean", "median", "max"), cells)),
        "size": human_bytes(total),
        "cell": f"{total / sum(tokens):.0f} B" if tokens else "",
        "each": human_bytes(total / assets) if assets else "",
    }


def cost_rows(stats: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds by stage and peak memory: mean, median, 95th percentile, maximum, sum."""
    by_stage: dict[str, list[float]] = {}
    for row in stats:
        for stage, seconds in json.loads(row["stage_seconds"]).items():
            by_stage.setdefault(stage, []).append(seconds)
    order = {stage: number for number, stage in enumerate(STAGES)}
    shared = sorted(stage for stage in by_stage if not is_product_name(stage))
    made = sorted(Product.parse(stage) for stage in by_stage if is_product_name(stage))
    stages = [*sorted(shared, key=lambda stage: order.get(stage, len(order))), *map(str, made)]
    costs = [_cost(stage, by_stage[stage], human_seconds) for stage in stages]
    if stats:
        costs.append(_cost("whole asset", [row["seconds"] for row in stats], human_seconds))
        memory = _cost("peak memory", [row["peak_rss_bytes"] for row in stats], human_bytes)
        costs.append({**memory, "values": [*memory["values"][:-1], ""]})
    return costs


def _cost(name: str, values: Sequence[float], show: Any) -> dict[str, Any]:
    numbers = (
        np.mean(values),
        np.median(values),
        np.percentile(values, 95),
        max(values),
        sum(values),
    )
    return {"name": name, "count": len(values), "values": [show(number) for number in numbers]}


def contact_sheet(build: Build, limit: int) -> dict[str, Any]:
    """Pictures of up to `limit` finished assets, spread over the build, drawn in a child that may crash."""
    sdf = [product.resolution for product in build.markers if product.kind == "sdf"]
    renders = next((p.variant for p in build.markers if p.kind == "renders"), None)
    done = [row for row in build.rows if row["status"] == "done"]
    sheet: dict[str, Any] = {
        "cards": [],
        "picture_resolution": 0,
        "no_pictures": "nothing is finished",
    }
    if not sdf or renders is None or not done or limit < 1:
        return sheet
    small = [resolution for resolution in sdf if resolution <= PICTURE_RESOLUTION]
    resolution = max(small, default=min(sdf))
    chosen = [done[i * len(done) // min(limit, len(done))] for i in range(min(limit, len(done)))]
    folder = Path(tempfile.mkdtemp(prefix="report-"))
    isolated = Isolated("pipeline.report_pictures:warm_up")
    try:
        assets = tuple((row["shard"], row["uid"]) for row in chosen)
        job = PictureJob(
            out=build.plan.out, assets=assets, resolution=resolution, cameras=renders, folder=folder
        )
        end = isolated.call(
            "pipeline.report_pictures:draw",
            job,
            log=folder / "log.txt",
            timeout_s=PICTURE_TIMEOUT_S,
            memory_bytes=PICTURE_BYTES,
        )
        if end.reason:
            log.warning("the report has no or few pictures: %s %s", end.reason, end.detail)
        cards = [card for row in chosen if (card := _card(folder, row, sdf)) is not None]
    finally:
        isolated.close()
        shutil.rmtree(folder)
    reason = f"drawing them ended with {end.reason} {end.detail}".strip()
    return {"cards": cards, "picture_resolution": resolution, "no_pictures": reason}


def _card(folder: Path, row: dict[str, Any], resolutions: Iterable[int]) -> dict[str, Any] | None:
    files = {kind: folder / f"{row['uid']}-{kind}.webp" for kind in PICTURES}
    if not all(file.exists() for file in files.values()):
        return None
    tokens = [
        f"{row[tokens_column(r)]:,} tokens at {r}"
        for r in resolutions
        if row.get(tokens_column(r)) is not None
    ]
    return {
        "uid": row["uid"],
        "url": row["url"],
        "faces": f"{row['faces']:,}",
        "sign_path": row["sign_path"],
        "tokens": ", ".join(tokens),
        "images": [(kind, image_uri(file.read_bytes(), "webp")) for kind, file in files.items()],
    }


def human_bytes(count: float) -> str:
    """1234567 -> "1.23 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def human_seconds(seconds: float) -> str:
    """Milliseconds, seconds or hours, three digits."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds / 3600:.3g} h"


def main(args: Sequence[str]) -> None:
    cfg = parse(ReportConfig, args, prog="python -m pipeline.report")
    check_exists(cfg.directory)
    log.info("%s", write_report(cfg.directory, cfg.pictures))


if __name__ == "__main__":
    command(main)
