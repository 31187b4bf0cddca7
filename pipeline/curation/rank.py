"""Decide which screened assets are kept: thresholds, a quality score, copies, shares, a target."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.core.errors import UserError
from pipeline.core.grid import CELL_SIDE
from pipeline.curation.config import TERM_WEIGHTS, RankConfig, parse_assignments
from pipeline.curation.dedup import (
    Signatures,
    find_copies,
    find_duplicates,
    signatures_of_looks,
)
from pipeline.curation.licences import licence_of
from pipeline.curation.reasons import thresholds
from pipeline.curation.shape_moments import decode_moments

LISTED = "listed."  # prefix of the columns that come from a list of assets
RESOLUTION_OF_LIMITS = 256  # at which --rank.min-tokens and --rank.max-tokens count tokens
TERM = "term_"  # prefix of the columns with the terms of the score


def rank(table: pa.Table, cfg: RankConfig) -> pa.Table:
    """Judge all screened assets and order them, the kept ones first.

    Args:
        table: One row per screened asset in any order. It has the columns of the manifest and
            `missing_files`, and for assets that passed screening those of `ScreeningMetrics`.
        cfg: Thresholds and the number of assets to keep.

    Returns:
        The table with the columns score, one `term_<name>` for each term of it, keep, rank (-1 if
        not kept), duplicate_of, duplicate_kind (see `dedup.Duplicate`) and copy_group: the smallest
        uid of the asset's copies, copies of its copies and so on. For assets that are not kept,
        stage and reason say why. Kept assets come first, the best at the top, then all others by
        uid.

    Raises:
        UserError: If an option names a column that the table does not have, or the metrics are of
            a build by an older version.
    """
    if "visible_moments" not in table.column_names:
        raise UserError(
            "the assets were screened by an older version, which did not measure what ranking "
            "needs; choose another --out"
        )
    table = table.sort_by("uid")
    was_screened = np.asarray(table["status"].to_numpy(zero_copy_only=False) == "done")
    uids = table["uid"].to_numpy(zero_copy_only=False)
    values = {
        name: _as_floats(table, name) for name in table.column_names if _is_number(table, name)
    }
    terms = score_terms(table, values, was_screened, cfg)
    score = weighted_score(terms, cfg)
    stage, reason = (np.array(table[name].to_pylist(), object) for name in ("stage", "reason"))

    # Thresholds. The first one that an asset fails is its reason.
    for name, fails in _failed_thresholds(table, values, cfg).items():
        rejected = was_screened & (reason == "") & fails
        stage[rejected] = "rank"
        reason[rejected] = name

    # Copies. The best asset comes first, and equal scores are ordered by uid: the rows are sorted
    # by uid already and the sort is stable. Groups of copies contain rejected assets, too.
    measured = np.flatnonzero(was_screened)
    copies = find_copies(_signatures(table.take(measured)), cfg.dedup)
    candidates = np.flatnonzero(was_screened & (reason == ""))
    candidates = candidates[np.argsort(-score[candidates], kind="stable")]
    order = np.searchsorted(measured, candidates)
    duplicate_of, duplicate_kind = (np.full(len(uids), "", object) for _ in range(2))
    for position, duplicate in find_duplicates(copies, order.tolist()).items():
        asset = measured[position]
        stage[asset], reason[asset] = "duplicates", duplicate.reason
        duplicate_of[asset] = uids[measured[duplicate.original]]
        duplicate_kind[asset] = duplicate.kind
    copy_group = uids.astype(object)
    components = copies.components()
    _, first = np.unique(components, return_index=True)  # rows are sorted by uid
    copy_group[measured] = uids[measured[first]][components]

    # The target, within the largest shares.
    unique = candidates[reason[candidates] == ""]
    kept, over_share = choose(unique, _shares(table, cfg), cfg.target_count)
    stage[unique], reason[unique] = "rank", "below_target"
    reason[over_share] = "over_share"
    stage[kept] = reason[kept] = ""
    position = np.full(len(uids), -1, np.int64)
    position[kept] = np.arange(len(kept))

    ranked = table.drop_columns(["stage", "reason"])
    for name, column in [
        ("stage", pa.array(stage.tolist(), pa.string())),
        ("reason", pa.array(reason.tolist(), pa.string())),
        ("score", pa.array(score)),
        *((TERM + name, pa.array(term)) for name, term in terms.items()),
        ("keep", pa.array(position >= 0)),
        ("rank", pa.array(position)),
        ("duplicate_of", pa.array(duplicate_of.tolist(), pa.string())),
        ("duplicate_kind", pa.array(duplicate_kind.tolist(), pa.string())),
        ("copy_group", pa.array(copy_group.tolist(), pa.string())),
    ]:
        ranked = ranked.append_column(name, column)
    return ranked.take(np.concatenate([kept, np.flatnonzero(position < 0)]))


def score_terms(
    table: pa.Table,
    values: dict[str, NDArray[np.float64]],
    was_screened: NDArray[np.bool_],
    cfg: RankConfig,
) -> dict[str, NDArray[np.float64]]:
    """Return the terms of the score by name, each [N] in [0, 1]. Assets without metrics have 0.

    A column of a list that has a weight is a term, too: the share of the assets with a value that
    are not better.

    Raises:
        UserError: If a weight names neither a term nor a column of numbers of the list.
    """
    terms = quality_terms(values)
    for name in parse_assignments("weights", cfg.weights):
        if name not in terms:
            listed = _listed_numbers(table, name, "--rank.weights")
            known = np.sort(listed[~np.isnan(listed)])
            better = np.searchsorted(known, listed, side="right") / max(len(known), 1)
            terms[name] = np.where(np.isnan(listed), 0.0, np.round(better, 6))
    return {name: np.where(was_screened, term, 0.0) for name, term in terms.items()}


def weighted_score(terms: dict[str, NDArray[np.float64]], cfg: RankConfig) -> NDArray[np.float64]:
    """Return the mean of the terms by their weights, [N] in [0, 1], rounded to 6 digits."""
    weights = {**TERM_WEIGHTS, **parse_assignments("weights", cfg.weights)}
    total = sum(weights[name] for name in terms)
    summed = sum((weights[name] * term for name, term in terms.items()), np.float64(0.0))
    return np.round(summed / total, 6)


def choose(
    best_first: NDArray[np.int64],
    shares: Sequence[tuple[NDArray[np.bool_], float]],
    target: int | None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose the best assets so that no group has more than its share of the chosen ones.

    Args:
        best_first: Rows of the assets to choose from.
        shares: Groups of rows, bool [N], and the largest share of each.
        target: Number of assets to choose. None chooses all that the shares allow.

    Returns:
        The rows of the chosen assets, and of those that a share kept from being chosen.
    """
    size = len(best_first) if target is None else min(target, len(best_first))
    while True:
        # The limits follow from the number of chosen assets, which they may reduce.
        room = np.array([np.floor(share * size + 1e-9) for _, share in shares], np.int64)
        chosen: list[int] = []
        over: list[int] = []
        for row in best_first.tolist():
            if len(chosen) == size:
                break
            is_member = np.array([bool(members[row]) for members, _ in shares], np.bool_)
            if (room[is_member] < 1).any():
                over.append(row)
                continue
            room[is_member] -= 1
            chosen.append(row)
        if len(chosen) == size:
            return np.array(chosen, np.int64), np.array(over, np.int64)
        size = len(chosen)


def _shares(table: pa.Table, cfg: RankConfig) -> list[tuple[NDArray[np.bool_], float]]:
    """Return the groups that --rank.max-share limits, as bool [N], and their largest shares."""
    limits = parse_assignments("max_share", cfg.max_share)
    groups = []
    for key, share in limits.items():
        kind, colon, name = key.partition(":")
        if not colon:
            kind, name = "source", key
        labels = _labels(table, kind)
        names = sorted(set().union(*labels)) if name == "*" else [_spelled(kind, name)]
        for one in names:
            members = np.array([one in label for label in labels], np.bool_)
            groups.append((members, share))
    return groups


def _labels(table: pa.Table, kind: str) -> list[set[str]]:
    """Return the sources, licences or tags of each asset."""
    if kind == "tag":
        metadata = [json.loads(text or "{}") for text in table["metadata"].to_pylist()]
        words = [(*item.get("tags", ()), *item.get("categories", ())) for item in metadata]
        return [{_spelled(kind, word) for word in row} for row in words]
    return [{_spelled(kind, text)} for text in table[kind].to_pylist()]


def _spelled(kind: str, name: str) -> str:
    return licence_of(name) if kind == "licence" else name.lower()


def _listed_numbers(table: pa.Table, name: str, option: str) -> NDArray[np.float64]:
    """Return a column of numbers of the list, [N], NaN where an asset has none.

    Raises:
        UserError: If the list has no such column of numbers.
    """
    column = LISTED + name
    if column not in table.column_names or not _is_number(table, column):
        numbers = [
            other.removeprefix(LISTED)
            for other in table.column_names
            if other.startswith(LISTED) and _is_number(table, other)
        ]
        raise UserError(
            f"{option} names {name!r}, which is neither a term of the score nor a column of "
            f"numbers of the list; those are {' '.join([*TERM_WEIGHTS, *numbers])}"
        )
    return table[column].cast(pa.float64()).to_numpy().astype(np.float64)


def quality_terms(
    values: dict[str, NDArray[np.float64]],
) -> dict[str, NDArray[np.float64]]:
    """Compute the terms of the quality score, each in [0, 1]. docs/data_quality.md explains them.

    Args:
        values: Columns of the metrics by name, each [N].

    Returns:
        {name: [N]} in the order of TERM_WEIGHTS.
    """
    size = np.sqrt(np.maximum(values["visible_area"], 1e-9))
    terms = {
        "bends": _on_log_scale(values["bend"] / size, 3.6, 25),
        "edges": _on_log_scale(values["sharp_length"] / size, 3, 40),
        "tokens": _on_log_scale(values["relative_tokens"], 0.3, 2),
        "topology": (1 - 0.6 * values["sheet_share"])
        * (1 - _between(values["leak_fraction"], 0.02, 0.5))
        * (1 - _between(values["cap_share"], 0.05, 0.5)),
        "outline": 1 - _between(values["solid_fraction"], 0.6, 1),
        "colors": _on_log_scale(values["colors_seen"], 1.5, 8),
        "views": _between(values["coverage_mean"], 0.01, 0.1),
        "complete": (values["missing_files"] == 0).astype(np.float64),
        "object": _between(values["object_share"], 0.5, 1),
        "ground": 1 - _between(values["ground_share"], 0.1, 0.6),
    }
    return {name: np.round(terms[name], 6) for name in TERM_WEIGHTS}


def _on_log_scale(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """Map low to 0 and high to 1 on a logarithmic scale, and what lies beyond to the nearer one."""
    return _between(np.log(np.maximum(values, 1e-9)), float(np.log(low)), float(np.log(high)))


def _between(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """Map low to 0 and high to 1, and what lies beyond to the nearer of the two."""
    return np.clip((values - low) / (high - low), 0, 1)


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
    table: pa.Table, values: dict[str, NDArray[np.float64]], cfg: RankConfig
) -> dict[str, NDArray[np.bool_]]:
    """Return for each reason which assets [N] fail it, in the order of the checks."""
    # An asset without a value fails, because NaN is neither larger nor smaller than anything.
    low, high = (np.zeros(table.num_rows, np.bool_) for _ in range(2))
    for name, limit in parse_assignments("min_listed", cfg.min_listed).items():
        low |= ~(_listed_numbers(table, name, "--rank.min-listed") >= limit)
    for name, limit in parse_assignments("max_listed", cfg.max_listed).items():
        high |= ~(_listed_numbers(table, name, "--rank.max-listed") <= limit)
    tokens = np.round(values["relative_tokens"] * (RESOLUTION_OF_LIMITS / CELL_SIDE) ** 2)
    return {
        "low_listed_value": low,
        "high_listed_value": high,
        "leaks": values["leak_fraction"] > cfg.max_leak_fraction,
        "plain_box": values["solid_fraction"] > cfg.max_solid_fraction,
        "hollow": values["solid_fraction"] < cfg.min_solid_fraction,
        "too_few_tokens": tokens < cfg.min_tokens,
        "too_many_tokens": tokens > cfg.max_tokens,
        "low_coverage": values["coverage_mean"] < cfg.min_coverage,
        "dark": values["brightness_mean"] < cfg.min_brightness,
        "washed_out": values["white_max"] > cfg.max_white,
        "monotonous": values["contrast_mean"] < cfg.min_contrast,
        "missing_files": values["missing_files"] > cfg.max_missing_files,
    }


def _signatures(table: pa.Table) -> Signatures:
    """Return the signatures of assets that have metrics."""
    return signatures_of_looks(
        table["sha256"].to_pylist(),
        decode_moments(table["visible_moments"].to_pylist()),
        decode_moments(table["face_moments"].to_pylist()),
        _as_floats(table, "cap_share"),
    )


def _is_number(table: pa.Table, name: str) -> bool:
    kind = table.schema.field(name).type
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _as_floats(table: pa.Table, name: str) -> NDArray[np.float64]:
    """Return a column as float64 [N], with 0 for missing values."""
    return np.nan_to_num(table[name].cast(pa.float64()).to_numpy().astype(np.float64))
