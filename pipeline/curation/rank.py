"""Decide which screened assets are kept: thresholds, a quality score, duplicates and a target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.curation.config import RankConfig
from pipeline.curation.dedup import Signatures, find_duplicates
from pipeline.curation.reasons import thresholds

WEIGHTS = {"detail": 0.30, "texture": 0.25, "solid": 0.20, "views": 0.15, "complete": 0.10}


def rank(table: pa.Table, cfg: RankConfig) -> pa.Table:
    """Judge all screened assets and order them, the kept ones first.

    Args:
        table: One row per screened asset in any order. It has the columns of the manifest and
            `missing_files`, and for assets that passed screening those of `ScreeningMetrics`.
        cfg: Thresholds and the number of assets to keep.

    Returns:
        The table with the columns score, keep, rank (-1 if not kept) and duplicate_of. For assets
        that are not kept, stage and reason say why. Kept assets come first, the best at the top,
        then all others by uid.
    """
    table = table.sort_by("uid")
    was_screened = np.asarray(table["status"].to_numpy(zero_copy_only=False) == "done")
    uids = table["uid"].to_numpy(zero_copy_only=False)
    values = {
        name: _as_floats(table, name) for name in table.column_names if _is_number(table, name)
    }
    score = np.where(was_screened, np.round(quality(values), 6), 0.0)
    stage, reason = (np.array(table[name].to_pylist(), object) for name in ("stage", "reason"))

    # Thresholds. The first one that an asset fails is its reason.
    for name, fails in _failed_thresholds(values, cfg).items():
        rejected = was_screened & (reason == "") & fails
        stage[rejected] = "rank"
        reason[rejected] = name

    # Duplicates. The best asset comes first, and equal scores are ordered by uid: the rows are
    # sorted by uid already and the sort is stable.
    candidates = np.flatnonzero(was_screened & (reason == ""))
    candidates = candidates[np.argsort(-score[candidates], kind="stable")]
    signatures = _signatures(table.take(candidates), values, candidates)
    duplicates = find_duplicates(signatures, cfg.dedup)
    duplicate_of = np.full(len(uids), "", object)
    for duplicate, (name, original) in duplicates.items():
        stage[candidates[duplicate]] = "duplicates"
        reason[candidates[duplicate]] = name
        duplicate_of[candidates[duplicate]] = uids[candidates[original]]

    # The target.
    is_unique = [number not in duplicates for number in range(len(candidates))]
    unique = candidates[np.array(is_unique, bool)]
    kept = unique[: cfg.target_count]
    below_target = unique[len(kept) :]
    stage[below_target] = "rank"
    reason[below_target] = "below_target"
    position = np.full(len(uids), -1, np.int64)
    position[kept] = np.arange(len(kept))

    ranked = table.drop_columns(["stage", "reason"])
    for name, column in [
        ("stage", pa.array(stage.tolist(), pa.string())),
        ("reason", pa.array(reason.tolist(), pa.string())),
        ("score", pa.array(score)),
        ("keep", pa.array(position >= 0)),
        ("rank", pa.array(position)),
        ("duplicate_of", pa.array(duplicate_of.tolist(), pa.string())),
    ]:
        ranked = ranked.append_column(name, column)
    return ranked.take(np.concatenate([kept, np.flatnonzero(position < 0)]))


def quality(values: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """Compute the quality score: five parts, each in [0, 1], weighted by WEIGHTS.

    detail: The logarithm of the number of faces, from 100 (0) to 1,000,000 (1).
    texture: 1 with an image, 0.5 with vertex colours or several materials, otherwise 0.
    solid: The share of the visible surface that bounds a solid.
    views: The mean coverage of the images, with 0.15 as 1, times the mean contrast, with 0.1 as 1.
    complete: 1 if no side file is missing, otherwise 0.

    Args:
        values: Columns of the metrics by name, each [N].

    Returns:
        [N] scores in [0, 1].
    """
    parts = {
        "detail": np.clip(np.log10(np.maximum(values["faces"], 1) / 100) / 4, 0, 1),
        "texture": np.where(values["textured"] > 0, 1.0, 0.5 * (values["colored"] > 0)),
        "solid": 1 - values["sheet_share"],
        "views": np.clip(values["coverage_mean"] / 0.15, 0, 1)
        * np.clip(values["contrast_mean"] / 0.1, 0, 1),
        "complete": (values["missing_files"] == 0).astype(np.float64),
    }
    return sum(
        (WEIGHTS[name] * part for name, part in parts.items()), np.zeros(len(values["faces"]))
    )


def funnel_rows(table: pa.Table, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Count the assets that are not kept, by reason.

    Args:
        table: A ranked catalogue.
        options: The configuration as JSON, with one object per section.

    Returns:
        One row per reason, the most frequent first: stage, reason, thresholds (options with their
        values) and assets (their number).
    """
    dropped = table.filter(pc.invert(table["keep"]))
    groups = dropped.group_by(["status", "stage", "reason"]).aggregate([("uid", "count")])
    rows = [
        {
            "stage": group["stage"],
            "reason": group["reason"],
            "thresholds": thresholds(group["reason"], options),
            "assets": group["uid_count"],
        }
        for group in groups.to_pylist()
    ]
    return sorted(rows, key=lambda row: (-row["assets"], row["stage"], row["reason"]))


def _failed_thresholds(
    values: dict[str, NDArray[np.float64]], cfg: RankConfig
) -> dict[str, NDArray[np.bool_]]:
    """Return for each reason which assets [N] fail it, in the order of the checks."""
    return {
        "leaks": values["leak_fraction"] > cfg.max_leak_fraction,
        "plain_box": values["solid_fraction"] > cfg.max_solid_fraction,
        "hollow": values["solid_fraction"] < cfg.min_solid_fraction,
        "too_few_tokens": values["tokens"] < cfg.min_tokens,
        "too_many_tokens": values["tokens"] > cfg.max_tokens,
        "low_coverage": values["coverage_mean"] < cfg.min_coverage,
        "dark": values["brightness_mean"] < cfg.min_brightness,
        "washed_out": values["white_max"] > cfg.max_white,
        "monotonous": values["contrast_mean"] < cfg.min_contrast,
        "missing_files": values["missing_files"] > cfg.max_missing_files,
    }


def _signatures(
    table: pa.Table, values: dict[str, NDArray[np.float64]], rows: NDArray[np.int64]
) -> Signatures:
    """Return the signatures of the candidates: `table` has only their rows, `values` all rows."""

    def packed_bits(name: str) -> NDArray[np.uint8]:
        joined = b"".join(table[name].to_pylist())
        width = table.schema.field(name).type.byte_width
        return np.frombuffer(joined, np.uint8).reshape(len(rows), width)

    return Signatures(
        sha256=table["sha256"].to_pylist(),
        area=values["visible_area"][rows],
        tokens=values["tokens"][rows].astype(np.int64),
        occupancy=packed_bits("occupancy"),
        looks=packed_bits("looks"),
    )


def _is_number(table: pa.Table, name: str) -> bool:
    kind = table.schema.field(name).type
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _as_floats(table: pa.Table, name: str) -> NDArray[np.float64]:
    """Return a column as float64 [N], with 0 for missing values."""
    return np.nan_to_num(table[name].cast(pa.float64()).to_numpy().astype(np.float64))
