"""Ranking: which assets are kept, the reasons of the others, and their order."""

from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import PRESETS, BuildConfig
from pipeline.curation.config import FilterConfig, RankConfig
from pipeline.curation.rank import WEIGHTS, funnel_rows, quality, rank
from pipeline.curation.reasons import THRESHOLDS

GOOD = {
    **{
        "status": "done",
        "stage": "",
        "reason": "",
        "faces": 10_000,
        "missing_files": 0,
        "tokens": 2000,
    },
    **{
        "solid_fraction": 0.4,
        "leak_fraction": 0.0,
        "sheet_share": 0.0,
        "visible_area": 2.0,
        "coverage_mean": 0.2,
    },
    **{"coverage_min": 0.1, "brightness_mean": 0.5, "contrast_mean": 0.05, "white_max": 0.0},
    **{"textured": True, "colored": False},
}


def catalogue(*changes, seed=0):
    """A row for each change of a good asset, named a, b, c and so on. No two are similar."""
    draw = np.random.default_rng(seed)
    rows = []
    for number, change in enumerate(changes):
        bits = {
            "occupancy": draw.bytes(512),
            "looks": draw.bytes(32),
            "sha256": draw.bytes(32).hex(),
        }
        rows.append({"uid": chr(ord("a") + number), **GOOD, **bits, **change})
    kinds = {"occupancy": pa.binary(512), "looks": pa.binary(32)}
    return pa.table(
        {name: pa.array([row[name] for row in rows], kinds.get(name)) for name in rows[0]}
    )


def ranked(*changes, **options):
    return rank(catalogue(*changes), RankConfig(**{"target_count": 100, **options}))


def reasons(table):
    return {row["uid"]: row["reason"] for row in table.to_pylist()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"leak_fraction": 0.051}, "leaks"),
        ({"solid_fraction": 0.99}, "plain_box"),
        ({"tokens": 99}, "too_few_tokens"),
        ({"tokens": 20_001}, "too_many_tokens"),
        ({"coverage_mean": 0.004}, "low_coverage"),
        ({"brightness_mean": 0.01}, "dark"),
        ({"white_max": 0.99}, "washed_out"),
        ({"contrast_mean": 0.001}, "monotonous"),
        ({"missing_files": 1}, "missing_files"),
        ({"leak_fraction": 0.051, "tokens": 3}, "leaks"),
    ],
)
def test_an_asset_beyond_a_threshold_has_its_reason(change, reason):
    table = ranked(change, {})
    assert reasons(table) == {"a": reason, "b": ""}
    if reason:
        assert THRESHOLDS[reason]


def test_sheets_pass_by_default():
    assert reasons(ranked({"solid_fraction": 0.0})) == {"a": ""}
    assert reasons(ranked({"solid_fraction": 0.0}, min_solid_fraction=0.1)) == {"a": "hollow"}


def test_thresholds_are_inclusive():
    edge = {
        "tokens": 100,
        "leak_fraction": 0.05,
        "solid_fraction": 0.985,
        "coverage_mean": 0.005,
        "white_max": 0.98,
    }
    assert reasons(ranked(edge)) == {"a": ""}


def test_the_best_come_first_and_ties_are_ordered_by_uid():
    table = ranked(
        {"faces": 100}, {"faces": 10_000}, {"faces": 1000}, {"faces": 10_000}, target_count=3
    )
    assert table["uid"].to_pylist() == ["b", "d", "c", "a"]
    assert table["rank"].to_pylist() == [0, 1, 2, -1]
    assert reasons(table) == {"a": "below_target", "b": "", "c": "", "d": ""}


def test_the_best_of_several_duplicates_is_kept():
    same = {"sha256": "0" * 64}
    table = ranked({"faces": 100, **same}, {"faces": 5000, **same}, {"faces": 1000, **same})
    rows = {row["uid"]: row for row in table.to_pylist()}
    assert {
        uid: (row["keep"], row["reason"], row["duplicate_of"]) for uid, row in rows.items()
    } == {
        "a": (False, "duplicate_bytes", "b"),
        "b": (True, "", ""),
        "c": (False, "duplicate_bytes", "b"),
    }


def test_a_rejected_asset_makes_no_other_a_duplicate():
    same = {"sha256": "0" * 64}
    table = ranked({"faces": 100, **same}, {"faces": 5000, "tokens": 1, **same})
    assert reasons(table) == {"a": "", "b": "too_few_tokens"}


def test_assets_that_failed_screening_keep_their_reason():
    nothing = dict.fromkeys(
        set(GOOD) - {"status", "stage", "reason", "missing_files", "textured", "colored"}
    )
    ended = {**nothing, "status": "rejected", "stage": "load", "reason": "unreadable"}
    table = ranked(ended, {"status": "failed", "stage": "fetch", "reason": "http_500"}, {})
    assert [
        (row["uid"], row["stage"], row["reason"], row["keep"]) for row in table.to_pylist()
    ] == [
        ("c", "", "", True),
        ("a", "load", "unreadable", False),
        ("b", "fetch", "http_500", False),
    ]


def test_the_order_of_rows_does_not_matter():
    draw = np.random.default_rng(1)
    table = catalogue(
        *({"faces": int(faces)} for faces in draw.integers(100, 5000, 20)), {"tokens": 1}
    )
    cfg = RankConfig(target_count=10)
    assert rank(table, cfg).equals(rank(table.take(draw.permutation(21)), cfg))


def test_quality_is_as_documented():
    rows = {
        name: np.array([value] * 2, np.float64)
        for name, value in GOOD.items()
        if not isinstance(value, str)
    }
    best = {**rows, "faces": np.array([1e6, 1e9]), "contrast_mean": np.array([0.1, 0.5])}
    np.testing.assert_allclose(quality(best), 1.0)
    worst = {
        **rows,
        "faces": np.array([100.0, 4]),
        "sheet_share": np.ones(2),
        "missing_files": np.ones(2),
    }
    worst |= {"textured": np.zeros(2), "coverage_mean": np.zeros(2)}
    np.testing.assert_allclose(quality(worst), 0.0)
    np.testing.assert_allclose(quality({**worst, "colored": np.ones(2)}), WEIGHTS["texture"] / 2)
    half = {**worst, "faces": np.full(2, 1e4), "sheet_share": np.full(2, 0.5)}
    np.testing.assert_allclose(quality(half), WEIGHTS["detail"] / 2 + WEIGHTS["solid"] / 2)
    assert sum(WEIGHTS.values()) == pytest.approx(1)


def test_the_funnel_counts_every_reason_with_its_thresholds():
    cfg = BuildConfig(rank=RankConfig(target_count=1, min_tokens=200))
    changes = [
        {"tokens": 150},
        {"tokens": 150},
        {},
        {},
        {"status": "rejected", "stage": "x", "reason": "y"},
    ]
    rows = funnel_rows(rank(catalogue(*changes), cfg.rank), cfg.shared())
    assert rows == [
        {
            "stage": "rank",
            "reason": "too_few_tokens",
            "thresholds": {"rank.min_tokens": 200},
            "assets": 2,
        },
        {
            "stage": "rank",
            "reason": "below_target",
            "thresholds": {"rank.target_count": 1},
            "assets": 1,
        },
        {"stage": "x", "reason": "y", "thresholds": {}, "assets": 1},
    ]


def test_every_threshold_is_an_option():
    options = asdict(BuildConfig())
    for names in THRESHOLDS.values():
        for name in names:
            section = options
            for part in name.split("."):
                assert part in section, name
                section = section[part]


def test_every_metadata_and_geometry_filter_is_in_the_funnel():
    assert {
        name for names in THRESHOLDS.values() for name in names if name.startswith("filter.")
    } == {
        f"filter.{name}" for name in FilterConfig.__dataclass_fields__ if name != "degenerate_area"
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_count": 0}, "target_count"),
        ({"best_count": 1}, "needs a target_count"),
        ({"target_count": 5, "best_count": 1}, "go together"),
        ({"target_count": 5, "best_resolutions": (64,)}, "go together"),
        ({"target_count": 5, "best_count": 1, "best_resolutions": (65,)}, "multiple of 8"),
    ],
)
def test_contradicting_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        RankConfig(**options)


def test_the_papers_preset_keeps_452000_and_makes_1024_for_the_best_68000():
    paper = PRESETS["paper"]
    assert (paper.rank.target_count, paper.rank.best_count, paper.rank.best_resolutions) == (
        452_000,
        68_000,
        (1024,),
    )
    assert (paper.resolutions, paper.filter.min_faces) == ((256, 384, 512), 100)
    with pytest.raises(ValueError, match="must not be among resolutions"):
        BuildConfig(resolutions=(1024,), rank=paper.rank)
