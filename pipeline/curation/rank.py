"""Which of the screened assets are kept: thresholds on what was measured, a quality score, copies, a target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.curation.config import RankConfig
from pipeline.curation.dedup import Signatures, find_duplicates

WEIGHTS = {"detail": 0.30, "texture": 0.25, "solid": 0.20, "views": 0.15, "complete": 0.10}
# Why an asset is turned away, and the options that decide it; the rest of the reasons have no threshold.
THRESHOLDS: dict[str, tuple[str, ...]] = {
    **{
        "unsupported_format": (),
        "licence": ("filter.licences",),
        "age_restricted": ("filter.age_restricted",),
    },
    **{"animated": ("filter.max_animations",), "banned_word": ("filter.banned_words",)},
    **{"file_too_small": ("filter.min_bytes",), "file_too_large": ("filter.max_bytes",)},
    **{
        "too_few_faces": ("filter.min_faces",),
        "too_many_faces": ("filter.max_faces", "load.max_faces"),
    },
    **{"degenerate": ("filter.min_area", "filter.min_width"), "flat": ("filter.min_thickness",)},
    **{
        "degenerate_faces": ("filter.max_degenerate_share",),
        "too_many_components": ("filter.max_components",),
    },
    **{"allocation_bomb": ("load.max_unpacked_bytes",), "plain_box": ("rank.max_solid_fraction",)},
    **{"leaks": ("rank.max_leak_fraction",), "hollow": ("rank.min_solid_fraction",)},
    **{"too_few_tokens": ("rank.min_tokens",), "too_many_tokens": ("rank.max_tokens",)},
    **{
        "low_coverage": ("rank.min_coverage",),
        "dark": ("rank.min_brightness",),
        "washed_out": ("rank.max_white",),
    },
    **{"monotonous": ("rank.min_contrast",), "missing_files": ("rank.max_missing_files",)},
    "duplicate_bytes": (),
    "duplicate_geometry": tuple(
        f"rank.dedup.{name}_percent" for name in ("area", "tokens", "occupancy")
    ),
    "duplicate_looks": ("rank.dedup.look_bits",),
    "below_target": ("rank.target_count",),
}


def rank(table: pa.Table, cfg: RankConfig) -> pa.Table:
    """Adds score, keep, rank, duplicate_of and, where an asset is not kept, stage and reason; the kept ones first.

    `table`: a row for every screened asset, with the manifest's columns, `missing_files` and, of those that came
    through, the measured ones. The order of the rows given does not matter.
    """
    table = table.sort_by("uid")
    measured = np.asarray(table["status"].to_numpy(zero_copy_only=False) == "done")
    uids = table["uid"].to_numpy(zero_copy_only=False)
    values = {name: _numbers(table, name) for name in table.column_names if _is_number(table, name)}
    score = np.where(measured, np.round(quality(values), 6), 0.0)
    stage, reason = (np.array(table[name].to_pylist(), object) for name in ("stage", "reason"))
    for name, bad in _verdicts(values, cfg).items():
        hit = measured & (reason == "") & bad
        stage[hit], reason[hit] = "rank", name
    # The best first, equals by uid; rows are sorted by uid already and the sort is stable.
    candidates = np.flatnonzero(measured & (reason == ""))
    candidates = candidates[np.argsort(-score[candidates], kind="stable")]
    copies = find_duplicates(_signatures(table.take(candidates), values, candidates), cfg.dedup)
    duplicate_of = np.full(len(uids), "", object)
    for copy, (why, original) in copies.items():
        stage[candidates[copy]], reason[candidates[copy]] = "duplicates", why
        duplicate_of[candidates[copy]] = uids[candidates[original]]
    left = np.array(
        [row for number, row in enumerate(candidates.tolist()) if number not in copies], np.int64
    )
    kept, below = left[: cfg.target_count], left[len(left[: cfg.target_count]) :]
    stage[below], reason[below] = "rank", "below_target"
    place = np.full(len(uids), -1, np.int64)
    place[kept] = np.arange(len(kept))
    replaced = table.drop_columns(["stage", "reason"])
    for name, column in [
        ("stage", pa.array(stage.tolist(), pa.string())),
        ("reason", pa.array(reason.tolist(), pa.string())),
        ("score", pa.array(score)),
        ("keep", pa.array(place >= 0)),
        ("rank", pa.array(place)),
        ("duplicate_of", pa.array(duplicate_of.tolist(), pa.string())),
    ]:
        replaced = replaced.append_column(name, column)
    return replaced.take(np.concatenate([kept, np.flatnonzero(place < 0)]))


def quality(values: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    """The score, 0..1: the sum of five parts, each 0..1, times WEIGHTS.

    detail: log10 of the faces from 100 (0) to 1,000,000 (1). texture: 1 with an image, 0.5 with vertex colours or
    several materials, else 0. solid: the share of the visible surface that bounds a solid. views: how much of the
    images the object covers (all of it at 15%) times how much its pixels vary (all of it at 0.1). complete: 1 if no
    side file is missing.
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
    """One row for every reason: stage, reason, its options with their values, assets; the most frequent first.

    `table`: a ranked catalogue; `options`: the config as JSON, sections by name.
    """
    lost = table.filter(pa.compute.invert(table["keep"]))
    groups = lost.group_by(["status", "stage", "reason"]).aggregate([("uid", "count")]).to_pylist()
    rows = [
        {
            "stage": group["stage"],
            "reason": group["reason"],
            "thresholds": thresholds(group["reason"], options),
            "assets": group["uid_count"],
        }
        for group in groups
    ]
    return sorted(rows, key=lambda row: (-row["assets"], row["stage"], row["reason"]))


def thresholds(reason: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options that decide about a reason, with their values in a config as JSON; {} where it has none."""
    found = {}
    for name in THRESHOLDS.get(reason, ()):
        value: Any = options
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            found[name] = value
    return found


def _verdicts(
    values: dict[str, NDArray[np.float64]], cfg: RankConfig
) -> dict[str, NDArray[np.bool_]]:
    """Reason -> which assets it holds for, in the order in which they are asked."""
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
    def bits(name: str) -> NDArray[np.uint8]:
        joined = b"".join(table[name].to_pylist())
        return np.frombuffer(joined, np.uint8).reshape(
            len(rows), table.schema.field(name).type.byte_width
        )

    return Signatures(
        sha256=table["sha256"].to_pylist(),
        area=values["visible_area"][rows],
        tokens=values["tokens"][rows].astype(np.int64),
        occupancy=bits("occupancy"),
        looks=bits("looks"),
    )


def _is_number(table: pa.Table, name: str) -> bool:
    kind = table.schema.field(name).type
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _numbers(table: pa.Table, name: str) -> NDArray[np.float64]:
    """A column as float64, 0 where there is none."""
    return np.nan_to_num(table[name].cast(pa.float64()).to_numpy().astype(np.float64))
