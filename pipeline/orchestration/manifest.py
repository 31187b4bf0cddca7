"""Manifest rows from the results of visits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.core.product import Product, is_product_name
from pipeline.core.schema import Record
from pipeline.curation.shape_moments import SIGNATURES
from pipeline.orchestration.asset_results import AssetResult
from pipeline.sources.id_list import listed_columns
from pipeline.storage.manifest import ManifestRow

MEASURED_COLUMNS = ("faces", "vertices", "components", "area", "volume", "sign_path", "scale")


def new_row(
    record: Record, result: AssetResult, *, shard: str, row: int, split: str
) -> ManifestRow:
    """Return the row of an asset after its first visit.

    An asset whose shape is known has no split yet, see `pipeline.orchestration.splits`.

    Args:
        record: The asset.
        result: How the visit ended.
        shard: Name of the shard.
        row: Position in the shard.
        split: The split of an asset without a shape, "train" or "val".
    """
    center = result.row.get("center")
    moments: dict[str, Any] = {
        name: bytes.fromhex(text) if (text := result.row.get(name)) else None for name in SIGNATURES
    }
    return ManifestRow(
        uid=record.uid,
        source=record.source,
        url=record.url,
        licence=record.licence,
        sha256=result.row.get("sha256", record.sha256),
        format=record.format,
        status=result.status,
        stage=result.stage,
        reason=result.reason,
        numbers=result.numbers,
        **{name: result.row.get(name) for name in MEASURED_COLUMNS},
        tokens=dict(result.tokens),
        center=None if center is None else tuple(center),
        shard=shard,
        row=row,
        split="" if any(moments.values()) else split,
        up_axis=result.row.get("up_axis"),
        up_origin=result.row.get("up_origin"),
        warnings=tuple(result.row.get("warnings", ())),
        listed=listed_columns(record.metadata),
        **moments,
    )


def updated_row(old: ManifestRow, result: AssetResult) -> ManifestRow:
    """Return the row of an asset after a later visit made more products.

    The result is the same as if one visit had made all products.

    Args:
        old: The row before the visit.
        result: How the visit ended.
    """
    row = replace(
        old,
        tokens={**old.tokens, **result.tokens},
        numbers={**old.numbers, **result.numbers},
    )
    # Of several products that reject an asset, the first in order decides the verdict.
    decides = old.status == "done" or (
        result.status != "done"
        and is_product_name(result.stage)
        and Product.parse(result.stage) < Product.parse(old.stage)
    )
    if decides:
        row = replace(row, status=result.status, stage=result.stage, reason=result.reason)
    return row
