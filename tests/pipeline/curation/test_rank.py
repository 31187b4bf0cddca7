"""Ranking: which assets are kept, the reasons of the others, and their order."""

from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import PRESETS, BuildConfig
from pipeline.core.errors import UserError
from pipeline.curation.config import TERM_WEIGHTS, FilterConfig, RankConfig
from pipeline.curation.rank import choose, funnel_rows, quality_terms, rank
from pipeline.curation.reasons import THRESHOLDS
from pipeline.curation.shape_moments import MOTIONS, surface_moments

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
    **{"relative_tokens": 1.5, "cap_share": 0.0, "bend": 10.0, "sharp_length": 8.0},
    **{"colors_seen": 5.0, "object_share": 1.0, "ground_share": 0.0},
    **{"source": "folder", "licence": "by", "metadata": ""},
}


def catalogue(*changes, seed=0):
    """A row for each change of a good asset, named a, b, c and so on. No two are similar."""
    draw = np.random.default_rng(seed)
    rows = []
    for number, change in enumerate(changes):
        bits = {
            "visible_moments": draw.uniform(-1, 1, 34).astype(np.float32).tobytes(),
            "face_moments": draw.uniform(-1, 1, 34).astype(np.float32).tobytes(),
            "sha256": draw.bytes(32).hex(),
        }
        rows.append({"uid": chr(ord("a") + number), **GOOD, **bits, **change})
    kinds = {name: pa.binary(136) for name in ("visible_moments", "face_moments")}
    return pa.table(
        {name: pa.array([row[name] for row in rows], kinds.get(name)) for name in rows[0]}
    )


def cells(count, resolution):
    """Return the measures of an asset with so many SDF cells."""
    return {"tokens": count, "relative_tokens": round(count * (8 / resolution) ** 2, 6)}


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
        (cells(99, 256), "too_few_tokens"),
        (cells(100, 256), ""),
        (cells(20_001, 256), "too_many_tokens"),
        (cells(20_000, 256), ""),
        (cells(6, 64), "too_few_tokens"),
        (cells(7, 64), ""),
        (cells(1249, 64), ""),
        (cells(1251, 64), "too_many_tokens"),
        ({"coverage_mean": 0.004}, "low_coverage"),
        ({"brightness_mean": 0.01}, "dark"),
        ({"white_max": 0.99}, "washed_out"),
        ({"contrast_mean": 0.001}, "monotonous"),
        ({"missing_files": 1}, "missing_files"),
        ({"leak_fraction": 0.051, **cells(3, 256)}, "leaks"),
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
    table = ranked({"bend": 8.0}, {"bend": 20.0}, {"bend": 12.0}, {"bend": 20.0}, target_count=3)
    assert table["uid"].to_pylist() == ["b", "d", "c", "a"]
    assert table["rank"].to_pylist() == [0, 1, 2, -1]
    assert reasons(table) == {"a": "below_target", "b": "", "c": "", "d": ""}


def test_the_best_of_several_duplicates_is_kept():
    same = {"sha256": "0" * 64}
    table = ranked({"bend": 8.0, **same}, {"bend": 20.0, **same}, {"bend": 12.0, **same})
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
    table = ranked({"bend": 8.0, **same}, {"bend": 20.0, **same, **cells(1, 256)})
    assert reasons(table) == {"a": "", "b": "too_few_tokens"}


def test_assets_that_failed_screening_keep_their_reason():
    nothing = dict.fromkeys(
        set(GOOD)
        - {"status", "stage", "reason", "missing_files", "textured", "colored"}
        - {"source", "licence", "metadata"}
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
    table = catalogue(*({"bend": float(bend)} for bend in draw.uniform(5, 40, 20)), cells(1, 256))
    cfg = RankConfig(target_count=10)
    assert rank(table, cfg).equals(rank(table.take(draw.permutation(21)), cfg))


def columns(**changes):
    """The numbers of two good assets, with changes."""
    numbers = {name: value for name, value in GOOD.items() if not isinstance(value, str)}
    return {name: np.full(2, float(value)) for name, value in {**numbers, **changes}.items()}


@pytest.mark.parametrize(
    ("term", "worst", "best"),
    [
        # A sphere of the area A bends by 2 sqrt(pi A) = 3.54 sqrt(A).
        ("bends", {"bend": 3.54 * 2**0.5}, {"bend": 25 * 2**0.5}),
        ("edges", {"sharp_length": 0.0}, {"sharp_length": 40 * 2**0.5}),
        ("tokens", {"relative_tokens": 0.3}, {"relative_tokens": 2.0}),
        ("topology", {"leak_fraction": 0.5}, {"leak_fraction": 0.02}),
        ("topology", {"cap_share": 0.5}, {"cap_share": 0.05}),
        ("outline", {"solid_fraction": 1.0}, {"solid_fraction": 0.6}),
        ("colors", {"colors_seen": 1.5}, {"colors_seen": 8.0}),
        ("views", {"coverage_mean": 0.01}, {"coverage_mean": 0.1}),
        ("complete", {"missing_files": 1}, {"missing_files": 0}),
        ("object", {"object_share": 0.5}, {"object_share": 1.0}),
        ("ground", {"ground_share": 0.6}, {"ground_share": 0.1}),
    ],
)
def test_each_term_goes_from_0_to_1(term, worst, best):
    assert quality_terms(columns(**worst))[term].tolist() == [0, 0]
    np.testing.assert_allclose(quality_terms(columns(**best))[term], 1, atol=1e-6)


def test_an_open_surface_has_less_than_half_of_the_topology_and_not_nothing():
    topology = quality_terms(columns(sheet_share=1.0))["topology"].tolist()
    assert topology == [pytest.approx(0.4)] * 2


def test_a_texture_does_not_raise_the_score():
    """Only colours that the views show count."""
    plain, textured = ranked({"textured": False}, {"textured": True})["score"].to_pylist()
    assert plain == textured


def test_the_catalogue_has_a_column_for_each_term_and_the_score_is_their_mean():
    (row,) = ranked({"bend": 14.0}).to_pylist()
    assert sum(TERM_WEIGHTS.values()) == pytest.approx(1)
    expected = sum(weight * row[f"term_{name}"] for name, weight in TERM_WEIGHTS.items())
    assert row["score"] == pytest.approx(expected, abs=1e-6)
    (changed,) = ranked({"bend": 14.0}, weights=("bends=0", "colors=0.42")).to_pylist()
    expected += 0.32 * (row["term_colors"] - row["term_bends"])
    assert changed["score"] == pytest.approx(expected, abs=1e-6)


def test_copies_are_named_and_grouped_with_rejected_assets():
    """b is a copy of c, which is rejected, and d is c turned by 90 degrees."""
    shape = np.random.default_rng(5).uniform(-0.4, 0.4, (6, 3, 3))

    def moments(triangles):
        both = surface_moments(triangles).astype(np.float32).tobytes()
        return {"visible_moments": both, "face_moments": both}

    table = ranked(
        {},
        {"bend": 20.0, **moments(shape)},
        {**cells(1, 256), **moments(shape)},
        moments(MOTIONS[1].apply(shape)),
    )
    rows = {row["uid"]: row for row in table.to_pylist()}
    assert {uid: row["copy_group"] for uid, row in rows.items()} == {
        "a": "a",
        **dict.fromkeys("bcd", "b"),
    }
    assert (rows["d"]["duplicate_of"], rows["d"]["duplicate_kind"]) == ("b", "turned_90")
    assert rows["c"]["reason"] == "too_few_tokens"


@pytest.mark.parametrize(
    ("cap_share", "same_faces", "is_copy"),
    [(0.0, False, True), (0.1, False, False), (0.1, True, True)],
)
def test_what_a_cap_hides_can_tell_assets_apart(cap_share, same_faces, is_copy):
    """An open window and one with a pane have the same surface after the opening is closed."""
    draw = np.random.default_rng(5)
    visible, one, other = (draw.uniform(-1, 1, 34).astype(np.float32).tobytes() for _ in range(3))
    table = ranked(
        {"cap_share": cap_share, "visible_moments": visible, "face_moments": one},
        {
            **{"cap_share": cap_share, "visible_moments": visible},
            "face_moments": one if same_faces else other,
        },
    )
    expected = "duplicate_geometry" if is_copy else ""
    assert reasons(table) == {"a": "", "b": expected}


def best_choice(scores, groups, shares, target):
    """Return how many assets the largest allowed selection of the best has, by trying all sizes."""
    for size in range(min(target, len(scores)), 0, -1):
        room = {name: int(share * size + 1e-9) for name, share in shares.items()}
        taken = []
        for row in sorted(range(len(scores)), key=lambda row: (-scores[row], row)):
            if len(taken) < size and room.get(groups[row], size) > 0:
                taken.append(row)
                room[groups[row]] = room.get(groups[row], size) - 1
        if len(taken) == size:
            return taken
    return []


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_no_group_exceeds_its_share_and_the_best_are_chosen(seed):
    draw = np.random.default_rng(seed)
    scores = draw.uniform(size=int(draw.integers(1, 30)))
    groups = draw.choice(list("abc"), len(scores))
    shares = {name: draw.choice([0.2, 0.4, 0.5, 1.0]) for name in "ab"}
    target = int(draw.integers(1, 25))
    order = np.argsort(-scores, kind="stable")
    limits = [(groups == name, share) for name, share in shares.items()]
    chosen, over = choose(order, limits, target)
    assert chosen.tolist() == best_choice(scores, groups.tolist(), shares, target)
    for name, share in shares.items():
        assert np.count_nonzero(groups[chosen] == name) <= share * len(chosen) + 1e-9
    assert not set(chosen) & set(over)


def test_shares_limit_sources_licences_and_tags():
    changes = [
        {"bend": 30.0, "source": "objaverse", "licence": "by"},
        {"bend": 29.0, "source": "objaverse", "licence": "cc0"},
        {"bend": 28.0, "source": "folder", "licence": "cc0", "metadata": '{"tags": ["Chair"]}'},
        {"bend": 27.0, "source": "folder", "licence": "by", "metadata": '{"tags": ["chair"]}'},
    ]
    for share, kept in [
        ("objaverse=0.5", "ac"),
        ("licence:cc0=0.5", "ab"),
        ("licence:by=0.4", "bc"),
        ("source:*=0.5", "ac"),
        ("tag:chair=0.4", "ab"),
    ]:
        table = ranked(*changes, target_count=2, max_share=(share,))
        assert "".join(row["uid"] for row in table.to_pylist() if row["keep"]) == kept, share
    table = ranked(*changes, target_count=2, max_share=("objaverse=0.5",))
    assert reasons(table) == {"a": "", "b": "over_share", "c": "", "d": "below_target"}


def test_columns_of_a_list_reject_and_score():
    table = catalogue({}, {}, {}, {})
    table = table.append_column("listed.aesthetic", pa.array([5.0, 7.0, None, 6.0]))
    table = table.append_column("listed.caption", pa.array(["x"] * 4))
    judged = rank(table, RankConfig(target_count=9, min_listed=("aesthetic=6",)))
    assert reasons(judged) == {"a": "low_listed_value", "b": "", "c": "low_listed_value", "d": ""}
    judged = rank(table, RankConfig(target_count=9, max_listed=("aesthetic=6",)))
    assert reasons(judged) == {
        **{"a": "", "b": "high_listed_value"},
        **{"c": "high_listed_value", "d": ""},
    }
    judged = rank(table, RankConfig(target_count=9, weights=("aesthetic=1",)))
    assert judged["uid"].to_pylist() == ["b", "d", "a", "c"]
    terms = {row["uid"]: row["term_aesthetic"] for row in judged.to_pylist()}
    assert terms == {"a": pytest.approx(1 / 3), "b": 1, "c": 0, "d": pytest.approx(2 / 3)}
    for cfg in (
        RankConfig(target_count=9, weights=("caption=1",)),
        RankConfig(target_count=9, min_listed=("other=1",)),
        RankConfig(target_count=9, max_listed=("caption=1",)),
    ):
        with pytest.raises(UserError, match=r"column of numbers of the list.* aesthetic$"):
            rank(table, cfg)


def test_metrics_of_an_older_version_cannot_be_ranked():
    with pytest.raises(UserError, match="screened by an older version"):
        rank(catalogue({}).drop_columns(["visible_moments"]), RankConfig(target_count=1))


def test_the_funnel_counts_every_reason_with_its_thresholds():
    cfg = BuildConfig(rank=RankConfig(target_count=1, min_tokens=200))
    changes = [
        cells(150, 256),
        cells(150, 256),
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
        ({"max_share": ("folder",)}, "NAME=NUMBER"),
        ({"max_share": ("folder=1.5",)}, "above 0 and at most 1"),
        ({"max_share": ("shape:x=0.5",)}, "licence:NAME=SHARE"),
        ({"weights": ("bends=-1",)}, "0 or more"),
        ({"weights": ("bends=nan",)}, "NAME=NUMBER"),
        ({"min_listed": ("a=1", "a=2")}, "NAME=NUMBER"),
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
