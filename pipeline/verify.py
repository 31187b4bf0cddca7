"""`python -m pipeline.verify DIR`: re-reads a build and names shard, asset and rule of every breach."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, cast

import pyarrow as pa
import tyro

from pipeline.core.cli import command, parse
from pipeline.core.errors import RunError
from pipeline.core.hashing import hash_of, split_of
from pipeline.core.options import CameraSet
from pipeline.core.product import Product, is_product_name, tokens_column
from pipeline.core.provenance import FORMAT_VERSION
from pipeline.core.schema import Record
from pipeline.curation.screening_metrics import read_metrics_table
from pipeline.orchestration.catalogue import CATALOGUE, Catalogue
from pipeline.orchestration.commit import (
    MANIFEST,
    committed,
    manifest_path,
    marker_path,
    product_paths,
    tree_sha256,
)
from pipeline.orchestration.manifest import STATUSES, read_manifest
from pipeline.orchestration.plan import Plan, read_plan
from pipeline.storage.config import PathOrUrl
from pipeline.storage.locks import local_copy
from pipeline.storage.remote import StorePath, check_exists, list_children
from pipeline.storage.render_shard import RenderShard, check_render_shard
from pipeline.storage.sdf_shard import SdfShard, check_sdf_shard

log = logging.getLogger(__name__)

TOP_LEVEL = {
    "plan.json",
    "plan.parquet",
    "catalogue.parquet",
    "sdf",
    "renders",
    "manifest",
    "stats",
    "shards",
    "screen",
    "report",
    "latents",  # train.encode's; not checked here
}


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Check every shard of a finished build; the exit code is 1 if any rule is broken."""

    directory: Annotated[PathOrUrl, tyro.conf.Positional]  # the build's output directory
    workers: int = 1  # shards checked at once


@dataclass(frozen=True, kw_only=True)
class Breach:
    """One broken rule. `asset` is "" where a whole shard is concerned, `shard` too where the build is."""

    shard: str
    asset: str
    rule: str

    def __str__(self) -> str:
        where = f"shard {self.shard}" if self.shard else "build"
        return f"{where}{', ' if self.asset else ''}{self.asset}: {self.rule}"


def verify(out: StorePath, workers: int = 1) -> list[Breach]:
    """Every breach found in a build, and in the screening that it is made from. UserError if `out` is not one."""
    plan = read_plan(out)
    screening = [
        replace(breach, shard=f"screen {breach.shard}") for breach in verify_screening(out, workers)
    ]
    held = committed(out)
    breaches = [Breach(shard="", asset="", rule=rule) for rule in _plan_problems(plan, held)]
    names = set().union(*held.values()) - {MANIFEST}
    products = sorted(Product.parse(name) for name in names if is_product_name(name))
    check = partial(verify_shard, plan, tuple(products))
    if workers > 1:
        # Not a fork server: that one keeps the environment of its first use, credentials with it.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(check, plan.shards))
    else:
        found = [check(shard) for shard in plan.shards]
    return breaches + screening + [breach for shard in found for breach in shard]


def verify_screening(out: StorePath, workers: int) -> list[Breach]:
    """Every breach in the pass that chose a ranked build's assets, if it is one."""
    return verify(out / "screen", workers) if (out / "screen" / "plan.json").exists() else []


def verify_shard(plan: Plan, products: Sequence[Product], shard: str) -> list[Breach]:
    """Every breach within one shard, which must have these products."""
    uids = {record.uid for record in plan.shard(shard)}
    products = [product for product in products if plan.wanted(product, shard)]
    parts = [manifest_path(Path(), shard), Path("shards", shard)]
    parts += [path for product in products for path in product_paths(product, shard)]
    with local_copy(plan.out, parts) as here:
        problems = list(_shard_problems(plan, here, products, shard))
    breaches = []
    for problem in problems:
        asset, colon, rule = problem.partition(": ")
        named = next((uid for uid in uids if uid in problem), "") if asset not in uids else asset
        breaches.append(
            Breach(shard=shard, asset=named, rule=rule if colon and asset in uids else problem)
        )
    return breaches


def _plan_problems(plan: Plan, held: Mapping[str, set[str]]) -> Iterator[str]:
    out, info = plan.out, plan.info
    if info.get("config_hash") != hash_of(info["config"]):
        yield "plan.json: config_hash does not belong to the config"
    if (info.get("assets"), info.get("shards")) != (plan.assets, len(plan.shards)):
        yield f"plan.json: counts {info.get('assets')} assets in {info.get('shards')} shards, plan.parquet does not"
    size = info["config"]["shard_size"]
    if plan.table["row"].to_pylist() != [i % size for i in range(plan.assets)]:
        yield "plan.parquet: rows are not numbered within their shards"
    if plan.table["shard"].to_pylist() != [f"{i // size:06d}" for i in range(plan.assets)]:
        yield f"plan.parquet: shards are not runs of {size} assets"
    if len(set(plan.table["uid"].to_pylist())) != plan.assets:
        yield "plan.parquet: a uid comes twice"
    if info["config"].get("rank") is not None:
        yield from _catalogue_problems(plan)
    for path in list_children(out):
        if path.name not in TOP_LEVEL:
            yield f"{path.name}: does not belong here" + (
                " (the build is not finished)" * (path.name == ".scratch")
            )
    names = set(plan.shards)
    kinds = [
        (kind, variant.name) for kind in ("renders", "sdf") for variant in list_children(out / kind)
    ]
    for shard, markers in sorted(held.items()):
        for name in sorted(markers - {MANIFEST}):
            if not is_product_name(name):
                yield f"shards/{shard}/{name}.json: belongs to no product"
    for kind, *variant in sorted([("manifest",), *kinds, ("shards",)]):
        folder = "/".join([kind, *variant])
        for name in [path.name for path in list_children(out / folder)]:
            shard = name.partition(".")[0]
            if shard not in names:
                yield f"{folder}/{name}: belongs to no shard of the plan"
            elif variant and f"{kind}-{variant[0]}" not in held.get(shard, ()):
                yield f"{folder}/{name}: has no commit marker"


def _catalogue_problems(plan: Plan) -> Iterator[str]:
    """Does a ranked build hold what its catalogue keeps?"""
    catalogue = Catalogue(path=plan.out / CATALOGUE)
    try:
        if catalogue.snapshot() != plan.info["snapshots"].get("catalogue"):
            yield f"{CATALOGUE}: is not the one that the plan was made from"
        elif [record.uid for record in catalogue.records()][: plan.assets] != plan.table[
            "uid"
        ].to_pylist():
            yield f"{CATALOGUE}: keeps other assets than the plan"
    except (OSError, pa.ArrowException) as error:
        yield f"{CATALOGUE}: cannot be read: {error}"


def _shard_problems(
    plan: Plan, out: Path, products: Sequence[Product], shard: str
) -> Iterator[str]:
    """Problems as "uid: rule" or "rule" of a shard that lies below `out`."""
    records = plan.shard(shard)
    markers: dict[Product | str, dict[str, Any]] = {}
    for product in (MANIFEST, *products):
        path = marker_path(out, shard, product)
        try:
            markers[product] = json.loads(path.read_text())
        except FileNotFoundError:
            yield f"{product}: has no commit marker"
            continue
        except ValueError:
            yield f"{product}: commit marker does not parse"
            continue
        paths = (
            [manifest_path(out, shard).relative_to(out)]
            if isinstance(product, str)
            else product_paths(product, shard)
        )
        yield from _marker_problems(plan, out, shard, product, markers[product], paths)
    try:
        rows = read_manifest(manifest_path(out, shard))
    except ValueError as error:
        yield str(error)
        return
    yield from _manifest_problems(plan, records, rows, shard)
    if MANIFEST in markers:
        counts = {status: sum(row["status"] == status for row in rows) for status in STATUSES}
        if markers[MANIFEST].get("counts") != {"assets": len(rows), **counts}:
            yield "manifest: marker counts other assets than the manifest"
    for product in products:
        if product in markers and all(
            (out / path).exists() for path in product_paths(product, shard)
        ):
            wanted = plan.wanted(product, shard)
            yield from _product_problems(out, shard, product, markers[product], rows, wanted)


def _marker_problems(
    plan: Plan,
    out: Path,
    shard: str,
    product: Product | str,
    marker: dict[str, Any],
    paths: Sequence[Path],
) -> Iterator[str]:
    """Does the marker speak of this product, and do its sizes and hashes hold?"""
    if (marker.get("shard"), marker.get("product")) != (shard, str(product)):
        yield f"{product}: marker is of {marker.get('product')} of shard {marker.get('shard')}"
    if product != MANIFEST:
        if marker.get("format_version") != FORMAT_VERSION:
            yield f"{product}: format_version is {marker.get('format_version')}, must be {FORMAT_VERSION}"
        of_all = {
            "format": FORMAT_VERSION,
            "shared": plan.info["config"],
            "product": marker.get("config"),
        }
        if marker.get("config_hash") != hash_of(of_all):
            yield f"{product}: config_hash does not belong to the config"
    files = {file["path"]: file for file in marker.get("files", [])}
    if sorted(files) != sorted(path.as_posix() for path in paths):
        yield f"{product}: marker lists {sorted(files)}"
        return
    for path in paths:
        if not (out / path).exists():
            yield f"{product}: {path} is missing"
            continue
        size, digest = tree_sha256(out / path)
        if size != files[path.as_posix()]["bytes"]:
            yield f"{product}: {path} has {size} bytes, its marker says {files[path.as_posix()]['bytes']}"
        elif digest != files[path.as_posix()]["sha256"]:
            yield f"{product}: {path} does not have its marker's sha256"
    if marker.get("bytes") != sum(file["bytes"] for file in files.values()):
        yield f"{product}: marker's bytes are not the sum of its files'"


def _manifest_problems(
    plan: Plan, records: Sequence[Record], rows: Sequence[dict[str, Any]], shard: str
) -> Iterator[str]:
    """One sound row for every asset of the plan, in its order."""
    held = [row["uid"] for row in rows]
    planned = [record.uid for record in records]
    yield from (f"{uid}: manifest row missing" for uid in planned if uid not in held)
    yield from (f"{uid}: manifest row not in the plan" for uid in held if uid not in planned)
    if held != planned and sorted(held) == sorted(planned):
        yield "manifest rows not in the plan's order"
    by_uid = {record.uid: record for record in records}
    val_percent = plan.info["config"]["val_percent"]
    for row in rows:
        uid = row["uid"]
        if uid not in by_uid:
            continue
        record = by_uid[uid]
        if any(
            row[name] != getattr(record, name) for name in ("source", "url", "licence", "format")
        ):
            yield f"{uid}: manifest row says otherwise than the plan"
        if (row["shard"], row["row"]) != (shard, planned.index(uid)):
            yield f"{uid}: manifest row is of shard {row['shard']} row {row['row']}"
        if row["split"] != split_of(uid, val_percent):
            yield f"{uid}: split must be {split_of(uid, val_percent)}, is {row['split']}"
        if row["status"] not in STATUSES or (row["status"] == "done") != (row["reason"] == ""):
            yield f"{uid}: status {row['status']} with reason {row['reason']!r}"
        if row["status"] == "done":
            numbers = [row["scale"], *(row["center"] or [None])]
            if any(number is None or not math.isfinite(number) for number in numbers):
                yield f"{uid}: done without a finite center and scale"
            if not row["sha256"] or not row["sign_path"]:
                yield f"{uid}: done without sha256 and sign_path"


def _product_problems(
    out: Path,
    shard: str,
    product: Product,
    marker: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    wanted: int,
) -> Iterator[str]:
    """The product's own format, and whether it agrees with the manifest, whose first rows must have it."""
    path = out / product_paths(product, shard)[0]
    done = [row["uid"] for row in rows[:wanted] if row["status"] == "done"]
    if product.kind == "sdf":
        column = tokens_column(product.resolution)
        tokens = {row["uid"]: row[column] for row in rows if row.get(column) is not None}
        problems = check_sdf_shard(path, list(tokens))
        yield from (_named(product, problem) for problem in problems)
        if not problems:
            reader = SdfShard(path)
            if reader.attributes["config_hash"] != marker.get("config_hash"):
                yield f"{product}: the store's config_hash is not its marker's"
            for uid, count in tokens.items():
                if reader.tokens(uid) != count:
                    yield f"{uid}: {product}: {reader.tokens(uid)} tokens, the manifest says {count}"
        counts = {"assets": len(tokens), "tokens": sum(tokens.values())}
        held = list(tokens)
    elif product.kind == "screen":
        try:
            held = read_metrics_table(path)["uid"].to_pylist()
        except ValueError as error:
            yield f"{product}: {error}"
            return
        counts = {"assets": len(held)}
        if held != done:
            yield f"{product}: holds {len(held)} assets, of which the manifest does not say done for all"
    else:
        views, size = marker["config"]["views"], marker["config"]["image_size"]
        try:
            stored = set(RenderShard(path).uids)
        except (ValueError, OSError) as error:
            yield f"{product}: unreadable index: {error}"
            return
        # An asset that another product turned away may have its renders nevertheless.
        held = [row["uid"] for row in rows if row["uid"] in stored or row["status"] == "done"]
        cameras = cast(CameraSet, product.variant)
        yield from (
            f"{product}: {problem}"
            for problem in check_render_shard(path, held, views, size, cameras)
        )
        counts = {"assets": len(held), "views": len(held) * views}
        if stored - set(held):
            yield f"{product}: holds {sorted(stored - set(held))}, which the manifest does not know"
    if marker.get("counts") != counts:
        yield f"{product}: marker counts {marker.get('counts')}, the shard has {counts}"
    yield from (f"{uid}: done without {product}" for uid in done if uid not in held)


def _named(product: Product, problem: str) -> str:
    """ "uid: rule" -> "uid: product: rule"; "rule" -> "product: rule"."""
    uid, colon, rule = problem.partition(": ")
    return f"{uid}: {product}: {rule}" if colon and " " not in uid else f"{product}: {problem}"


def main(args: Sequence[str]) -> None:
    cfg = parse(VerifyConfig, args, prog="python -m pipeline.verify")
    check_exists(cfg.directory)
    breaches = verify(cfg.directory, cfg.workers)
    for breach in breaches:
        log.error("%s", breach)
    if breaches:
        raise RunError(f"{cfg.directory}: {len(breaches)} breaches")
    log.info("%s: sound", cfg.directory)


if __name__ == "__main__":
    command(main)
