"""Checks the plan, commit markers, manifests and products of a build against the format."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import cast

import pyarrow as pa

from pipeline.core.cameras import camera_of
from pipeline.core.errors import UserError
from pipeline.core.hashing import hash_of
from pipeline.core.options import CameraSet
from pipeline.core.product import TRANSFORMS, VIEW_KINDS, Product, is_product_name
from pipeline.core.provenance import FORMAT_VERSION
from pipeline.core.schema import Record
from pipeline.curation.catalogue import Catalogue
from pipeline.curation.screening_metrics import read_metrics_table
from pipeline.inspection.asset_list import ATTRIBUTION_FILES
from pipeline.orchestration.plan import Plan, read_plan, shard_name
from pipeline.orchestration.splits import expected_splits, read_finished_manifests
from pipeline.storage.commit_marker import CommitMarker, read_marker, tree_sha256
from pipeline.storage.layout import (
    CATALOGUE,
    MANIFEST,
    PLAN,
    PLAN_TABLE,
    SCRATCH,
    SCREENING,
    list_commits,
    manifest_path,
    product_paths,
)
from pipeline.storage.locks import local_copy
from pipeline.storage.manifest import STATUSES, ManifestRow, read_manifest
from pipeline.storage.remote import StorePath, list_children
from pipeline.storage.render_shard import RenderShard, check_render_shard
from pipeline.storage.sdf_shard import SdfShard, check_sdf_shard
from pipeline.storage.transforms_shard import read_transforms_shard

TOP_LEVEL = {
    PLAN,
    PLAN_TABLE,
    CATALOGUE,
    "sdf",
    *VIEW_KINDS,
    TRANSFORMS,
    "manifest",
    "stats",
    "shards",
    SCREENING,
    "report",
    "latents",  # written by train.encode and not checked here
    *ATTRIBUTION_FILES,
}


@dataclass(frozen=True, kw_only=True)
class Breach:
    """One broken rule of the format.

    Attributes:
        shard: Name of the shard. "" if the whole build is concerned.
        asset: The uid. "" if a whole shard or the whole build is concerned.
        rule: What is wrong, in words.
    """

    shard: str
    asset: str
    rule: str

    def __str__(self) -> str:
        where = f"shard {self.shard}" if self.shard else "build"
        return f"{where}{', ' if self.asset else ''}{self.asset}: {self.rule}"


def verify(out: StorePath, workers: int = 1) -> list[Breach]:
    """Check a build, and the screening that chose its assets if there was one.

    Args:
        out: Output directory or URL of the build.
        workers: Number of shards to check at the same time, each in its own process.

    Returns:
        All breaches. Empty if the build is sound.

    Raises:
        UserError: If `out` is not a build.
    """
    plan = read_plan(out)
    screening = [
        replace(breach, shard=f"screen {breach.shard}") for breach in verify_screening(out, workers)
    ]
    committed_names = list_commits(out)
    problems = _plan_problems(plan, committed_names)
    build = [Breach(shard="", asset="", rule=problem) for problem in problems]
    names = set().union(*committed_names.values()) - {MANIFEST}
    products = sorted(Product.parse(name) for name in names if is_product_name(name))
    check = partial(verify_shard, plan, tuple(products))
    if workers > 1:
        # A fork server would keep the environment of its first use, and with it old credentials.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            shards = list(pool.map(check, plan.shards))
    else:
        shards = [check(shard) for shard in plan.shards]
    splits = list(_split_breaches(plan))
    return build + screening + [breach for shard in shards for breach in shard] + splits


def verify_screening(out: StorePath, workers: int) -> list[Breach]:
    """Check the screening pass of a ranked build. Return [] if there is none."""
    return verify(out / SCREENING, workers) if (out / SCREENING / PLAN).exists() else []


def verify_shard(plan: Plan, products: Sequence[Product], shard: str) -> list[Breach]:
    """Check one shard.

    Args:
        plan: The plan of the build.
        products: The products of the build. The shard must have those that the plan wants for it.
        shard: Name of the shard.

    Returns:
        All breaches. Empty if the shard is sound.
    """
    uids = {record.uid for record in plan.records(shard)}
    products = [product for product in products if plan.wanted(product, shard)]
    names = [manifest_path(Path(), shard), Path("shards", shard)]
    names += [path for product in products for path in product_paths(product, shard)]
    with local_copy(plan.out, names) as folder:
        problems = list(_shard_problems(plan, folder, products, shard))
    return [_breach(shard, uids, problem) for problem in problems]


def _split_breaches(plan: Plan) -> Iterator[Breach]:
    """Yield the assets that are in another split than they and their copies must be."""
    try:
        manifests = read_finished_manifests(plan)
        splits = expected_splits(plan, manifests, keep=False)
    except (UserError, OSError, ValueError) as error:
        yield Breach(shard="", asset="", rule=f"the splits cannot be checked: {error}")
        return
    names = {"": "none"}
    for shard, rows in manifests.items():
        for row in rows:
            split = splits.get(row.uid, row.split)  # a row that is not in the plan has none
            if row.split != split:
                rule = f"split must be {names.get(split, split)}, is {row.split}"
                yield Breach(shard=shard, asset=row.uid, rule=rule)


def _breach(shard: str, uids: set[str], problem: str) -> Breach:
    """Turn "uid: rule" or "rule" into a breach. A uid inside the rule also names the asset."""
    asset, colon, rule = problem.partition(": ")
    if colon and asset in uids:
        return Breach(shard=shard, asset=asset, rule=rule)
    mentioned = next((uid for uid in uids if uid in problem), "")
    return Breach(shard=shard, asset=mentioned, rule=problem)


def _plan_problems(plan: Plan, committed_names: Mapping[str, set[str]]) -> Iterator[str]:
    """Yield the rules that the plan and the names of files break."""
    info = plan.info
    # plan.json and plan.parquet must agree.
    if info.config_hash != hash_of(info.config):
        yield "plan.json: config_hash is not the hash of the config"
    if (info.assets, info.shards) != (plan.assets, len(plan.shards)):
        yield (
            f"plan.json: counts {info.assets} assets in {info.shards} shards, "
            f"but plan.parquet has {plan.assets} in {len(plan.shards)}"
        )
    size = info.shard_size
    if plan.table["row"].to_pylist() != [i % size for i in range(plan.assets)]:
        yield "plan.parquet: rows are not numbered within their shards"
    if plan.table["shard"].to_pylist() != [shard_name(i // size) for i in range(plan.assets)]:
        yield f"plan.parquet: shards are not runs of {size} assets"
    if len(set(plan.table["uid"].to_pylist())) != plan.assets:
        yield "plan.parquet: a uid occurs twice"
    if info.rank is not None:
        yield from _catalogue_problems(plan)
    # Every file must belong to a shard of the plan and to a commit marker.
    for path in list_children(plan.out):
        if path.name not in TOP_LEVEL:
            yield f"{path.name}: does not belong here" + (
                " (the build is not finished)" if path.name == SCRATCH else ""
            )
    for shard, names in sorted(committed_names.items()):
        for name in sorted(names - {MANIFEST}):
            if not is_product_name(name):
                yield f"shards/{shard}/{name}.json: belongs to no product"
    shards = set(plan.shards)
    variants = [
        (kind, variant.name)
        for kind in ("sdf", *VIEW_KINDS, TRANSFORMS)
        for variant in list_children(plan.out / kind)
    ]
    for kind, *variant in sorted([("manifest",), *variants, ("shards",)]):
        folder = "/".join([kind, *variant])
        for name in [path.name for path in list_children(plan.out / folder)]:
            shard = name.partition(".")[0]
            if shard not in shards:
                yield f"{folder}/{name}: belongs to no shard of the plan"
            elif variant and f"{kind}-{variant[0]}" not in committed_names.get(shard, ()):
                yield f"{folder}/{name}: has no commit marker"


def _catalogue_problems(plan: Plan) -> Iterator[str]:
    """Yield how the plan of a ranked build differs from the catalogue that it was made from."""
    catalogue = Catalogue(path=plan.out / CATALOGUE)
    try:
        if catalogue.snapshot() != plan.info.snapshots.get("catalogue"):
            yield f"{CATALOGUE}: is not the one that the plan was made from"
            return
        kept = [record.uid for record in catalogue.records()][: plan.assets]
        if kept != plan.table["uid"].to_pylist():
            yield f"{CATALOGUE}: keeps other assets than the plan"
    except (OSError, pa.ArrowException) as error:
        yield f"{CATALOGUE}: cannot be read: {error}"


def _shard_problems(
    plan: Plan, folder: Path, products: Sequence[Product], shard: str
) -> Iterator[str]:
    """Yield the problems of a shard below `folder`, as "uid: rule" or "rule"."""
    records = plan.records(shard)
    # Commit markers, and the bytes that they vouch for.
    markers: dict[Product | str, CommitMarker] = {}
    for product in (MANIFEST, *products):
        try:
            markers[product] = read_marker(folder, shard, product)
        except FileNotFoundError:
            yield f"{product}: has no commit marker"
            continue
        except ValueError:
            yield f"{product}: the commit marker does not parse"
            continue
        paths = (
            [manifest_path(Path(), shard)]
            if isinstance(product, str)
            else product_paths(product, shard)
        )
        yield from _marker_problems(plan, folder, shard, product, markers[product], paths)
    # The manifest.
    try:
        rows = read_manifest(manifest_path(folder, shard))
    except ValueError as error:
        yield str(error)
        return
    yield from _manifest_problems(plan, records, rows, shard)
    if MANIFEST in markers:
        counts = {status: sum(row.status == status for row in rows) for status in STATUSES}
        if markers[MANIFEST].counts != {"assets": len(rows), **counts}:
            yield "manifest: the marker counts other assets than the manifest"
    # The products, as far as they can be read.
    for product in products:
        complete = all((folder / path).exists() for path in product_paths(product, shard))
        if product in markers and complete:
            wanted = plan.wanted(product, shard)
            yield from _product_problems(folder, shard, product, markers[product], rows, wanted)


def _marker_problems(
    plan: Plan,
    folder: Path,
    shard: str,
    product: Product | str,
    marker: CommitMarker,
    paths: Sequence[Path],
) -> Iterator[str]:
    """Yield what is wrong with a marker: its names, its hashes, and the sizes of its files."""
    if (marker.shard, marker.product) != (shard, str(product)):
        yield (f"{product}: the marker is of {marker.product} of shard {marker.shard}")
    if product != MANIFEST:
        if marker.format_version != FORMAT_VERSION:
            yield (
                f"{product}: format_version is {marker.format_version}, must be {FORMAT_VERSION}"
            )
        hashed = {
            "format": FORMAT_VERSION,
            "shared": plan.info.config,
            "product": marker.config,
        }
        if marker.config_hash != hash_of(hashed):
            yield f"{product}: config_hash is not the hash of the config"
    files = {file.path: file for file in marker.files}
    if sorted(files) != sorted(path.as_posix() for path in paths):
        yield f"{product}: the marker lists the files {sorted(files)}"
        return
    for path in paths:
        if not (folder / path).exists():
            yield f"{product}: {path} is missing"
            continue
        size, digest = tree_sha256(folder / path)
        recorded = files[path.as_posix()]
        if size != recorded.bytes:
            yield f"{product}: {path} has {size} bytes, its marker says {recorded.bytes}"
        elif digest != recorded.sha256:
            yield f"{product}: {path} does not have its marker's sha256"
    if marker.bytes != sum(file.bytes for file in files.values()):
        yield f"{product}: the marker's bytes are not the sum of those of its files"


def _manifest_problems(
    plan: Plan, records: Sequence[Record], rows: Sequence[ManifestRow], shard: str
) -> Iterator[str]:
    """Yield what is wrong with a manifest, which has one row per asset in the order of the plan."""
    uids = [row.uid for row in rows]
    planned = [record.uid for record in records]
    yield from (f"{uid}: has no row in the manifest" for uid in planned if uid not in uids)
    unplanned = [uid for uid in uids if uid not in planned]
    yield from (f"{uid}: is in the manifest but not in the plan" for uid in unplanned)
    if uids != planned and sorted(uids) == sorted(planned):
        yield "the rows of the manifest are not in the order of the plan"
    records_by_uid = {record.uid: record for record in records}
    for row in rows:
        uid = row.uid
        if uid not in records_by_uid:
            continue
        record = records_by_uid[uid]
        if any(
            getattr(row, name) != getattr(record, name)
            for name in ("source", "url", "licence", "format")
        ):
            yield f"{uid}: the manifest row differs from the plan"
        if (row.shard, row.row) != (shard, planned.index(uid)):
            yield f"{uid}: the manifest row is of shard {row.shard} row {row.row}"
        if row.status not in STATUSES or (row.status == "done") != (row.reason == ""):
            yield f"{uid}: has status {row.status} with reason {row.reason!r}"
        if row.status == "done":
            numbers = [row.scale, *(row.center or [None])]
            if any(number is None or not math.isfinite(number) for number in numbers):
                yield f"{uid}: is done without a finite center and scale"
            if not row.sha256 or not row.sign_path:
                yield f"{uid}: is done without sha256 and sign_path"


def _product_problems(
    folder: Path,
    shard: str,
    product: Product,
    marker: CommitMarker,
    rows: Sequence[ManifestRow],
    wanted: int,
) -> Iterator[str]:
    """Yield how a product breaks its own format or disagrees with the manifest.

    Args:
        folder: Directory of the build.
        shard: Name of the shard.
        product: The product.
        marker: Its commit marker.
        rows: The rows of the manifest.
        wanted: Number of rows at the start of the manifest that must have the product.
    """
    path = folder / product_paths(product, shard)[0]
    done = [row.uid for row in rows[:wanted] if row.status == "done"]
    if product.kind == "sdf":
        tokens = {
            row.uid: count
            for row in rows
            if (count := row.tokens.get(product.resolution)) is not None
        }
        stored = list(tokens)
        counts = {"assets": len(tokens), "tokens": sum(tokens.values())}
        yield from _sdf_problems(path, product, marker, tokens)
    elif product.kind == "screen":
        try:
            stored = read_metrics_table(path)["uid"].to_pylist()
        except ValueError as error:
            yield f"{product}: {error}"
            return
        counts = {"assets": len(stored)}
        if stored != done:
            yield f"{product}: its {len(stored)} assets are not the done ones of the manifest"
    elif product.kind == TRANSFORMS:
        try:
            contents = read_transforms_shard(path)
        except (ValueError, OSError) as error:
            yield f"{product}: unreadable: {error}"
            return
        stored = [row.uid for row in rows if row.uid in contents or row.status == "done"]
        views = 0 if marker.config is None else marker.config["views"]
        counts = {"assets": len(stored), "views": len(stored) * views}
        if list(contents) != stored:
            yield f"{product}: its {len(contents)} assets are not those of the manifest"
        yield from (
            f"{uid}: {product}: has {len(content['frames'])} frames, must have {views}"
            for uid, content in contents.items()
            if len(content["frames"]) != views
        )
    else:
        if marker.config is None:
            yield f"{product}: the marker has no config"
            return
        views = marker.config["views"]
        image_size = marker.config["image_size"]
        try:
            rendered = set(RenderShard(path).uids)
        except (ValueError, OSError) as error:
            yield f"{product}: unreadable index: {error}"
            return
        # An asset that was rejected while another product was made may still have its renders.
        stored = [row.uid for row in rows if row.uid in rendered or row.status == "done"]
        counts = {"assets": len(stored), "views": len(stored) * views}
        problems = check_render_shard(
            path,
            stored,
            views,
            image_size,
            cast(CameraSet, marker.config["cameras"]),
            given=[
                camera_of(json.loads(text), number)
                for number, text in enumerate(marker.config.get("camera_list", ()))
            ],
            extension=product.extension(marker.config["format"]),
        )
        yield from (f"{product}: {problem}" for problem in problems)
        if rendered - set(stored):
            yield f"{product}: holds {sorted(rendered - set(stored))}, which the manifest lacks"
    if marker.counts != counts:
        yield f"{product}: the marker counts {marker.counts}, the shard has {counts}"
    yield from (f"{uid}: is done without {product}" for uid in done if uid not in stored)


def _sdf_problems(
    path: Path, product: Product, marker: CommitMarker, tokens: Mapping[str, int]
) -> Iterator[str]:
    """Yield the problems of an SDF shard. `tokens` says how many cells each asset must have."""
    problems = check_sdf_shard(path, list(tokens))
    yield from (_with_product(product, problem) for problem in problems)
    if problems:
        return
    reader = SdfShard(path)
    if reader.attributes["config_hash"] != marker.config_hash:
        yield f"{product}: the config_hash of the shard is not its marker's"
    for uid, count in tokens.items():
        if reader.tokens(uid) != count:
            yield f"{uid}: {product}: has {reader.tokens(uid)} tokens, the manifest says {count}"


def _with_product(product: Product, problem: str) -> str:
    """Turn "uid: rule" into "uid: product: rule", and "rule" into "product: rule"."""
    uid, colon, rule = problem.partition(": ")
    return f"{uid}: {product}: {rule}" if colon and " " not in uid else f"{product}: {problem}"
