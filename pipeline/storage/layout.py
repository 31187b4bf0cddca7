"""Where the files of a build lie: products, commit markers, manifests, statistics and scratch."""

from __future__ import annotations

from pathlib import Path

from pipeline.core.product import Product
from pipeline.storage.remote import AnyStorePath, StorePath, list_files

PLAN = "plan.json"
PLAN_TABLE = "plan.parquet"
CATALOGUE = "catalogue.parquet"
SCRATCH = ".scratch"
SCREENING = "screen"  # the first pass of a ranked build is a build of its own in this directory
MANIFEST = "manifest"  # name of the commit marker of a shard's manifest


def product_paths(product: Product, shard: str) -> list[Path]:
    """Return the files and directories of a product of one shard.

    Args:
        product: The product.
        shard: Name of the shard, such as "000012".

    Returns:
        Paths relative to the output directory. The first one is the product itself. Products with
        views have an index as the second one.
    """
    if product.kind == "sdf":
        return [Path("sdf", product.variant, f"{shard}.zarr")]
    if product.kind == "screen":
        return [Path("screen", product.variant, f"{shard}.parquet")]
    tar = Path(product.kind, product.variant, f"{shard}.tar")
    return [tar, index_path(tar)] if product.has_views else [tar]


def index_path(tar: AnyStorePath) -> AnyStorePath:
    """Return the index of a tar of renders: 000123.tar has 000123.index.parquet."""
    return tar.with_name(tar.name.removesuffix(".tar") + ".index.parquet")


def marker_path(out: AnyStorePath, shard: str, product: Product | str) -> AnyStorePath:
    """Return the commit marker of a product, or of the manifest if `product` is MANIFEST."""
    return out / "shards" / shard / f"{product}.json"


def manifest_path(out: AnyStorePath, shard: str) -> AnyStorePath:
    """Return the manifest of a shard."""
    return out / "manifest" / f"{shard}.parquet"


def stats_path(out: AnyStorePath, shard: str) -> AnyStorePath:
    """Return the table of what the work on a shard's assets cost."""
    return out / "stats" / f"{shard}.parquet"


def scratch_folder(out: Path, shard: str, uid: str) -> Path:
    """Return the directory with the finished files of one asset, before its shard is committed."""
    return out / SCRATCH / shard / uid


def list_commits(out: StorePath) -> dict[str, set[str]]:
    """List the commit markers of a build without reading them.

    Returns:
        {shard: names of its products, and MANIFEST} for every shard that has a marker.
    """
    commits: dict[str, set[str]] = {}
    for name in list_files(out / "shards"):
        shard, _, marker = name.partition("/")
        if marker.endswith(".json") and not marker.startswith("."):
            commits.setdefault(shard, set()).add(marker.removesuffix(".json"))
    return commits
