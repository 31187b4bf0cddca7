"""Names, splits, seeds and hashes are the same on every machine and in every version."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import pytest

from pipeline.config import PRESETS
from pipeline.core.hashing import (
    as_options,
    differences,
    hash_of,
    make_uid,
    options_of,
    seed_of,
    split_of,
    to_json,
)
from pipeline.core.options import BEFORE, added


def test_values_are_pinned():
    assert make_uid("folder", "a/b.glb") == "folder-6e5f48d59925c2df8234"
    assert seed_of("folder-a", "camera", 3) == 10654069641963112785
    assert hash_of({"b": (1, 2), "a": Path("x")}) == "721ef82f2d6c0997"


def test_a_split_depends_on_the_uid_alone_and_has_the_right_share():
    uids = [make_uid("folder", str(number)) for number in range(2000)]
    validation = {uid for uid in uids if split_of(uid, 10) == "val"}
    assert 140 < len(validation) < 260
    assert validation <= {uid for uid in uids if split_of(uid, 20) == "val"}
    assert {split_of(uid, 0) for uid in uids} == {"train"}
    assert {split_of(uid, 100) for uid in uids} == {"val"}


def test_differences_name_the_entries_that_changed():
    old = {"a": 1, "b": {"c": [1], "d": None}}
    new = {"a": 1, "b": {"c": [2], "d": None}, "e": "x"}
    assert differences(old, new) == ["b.c=[1], now [2]", 'e=null, now "x"']
    assert differences(old, old) == []


@dataclass(frozen=True, kw_only=True)
class Inner:
    sides: tuple[int, ...] = (1, 2)


@dataclass(frozen=True, kw_only=True)
class InnerToday(Inner):
    words: tuple[str, ...] = added((), before=())


@dataclass(frozen=True, kw_only=True)
class Further:
    shift: float = added(0.0, before=0.0)


@dataclass(frozen=True, kw_only=True)
class Before:
    limit: int | None = None
    inner: Inner = Inner()


@dataclass(frozen=True, kw_only=True)
class Today(Before):
    later: float = added(1.0, before=0.5)
    further: Further = field(default_factory=Further, metadata={BEFORE: {}})


def test_an_option_added_later_is_recorded_only_if_its_value_is_not_that_of_before():
    before = {"limit": None, "inner": {"sides": [1, 2]}}
    assert options_of(Before()) == before
    assert options_of(Today(later=0.5, inner=InnerToday())) == before
    changed = Today(inner=InnerToday(words=("a",)), further=Further(shift=2.0))
    assert options_of(changed) == {
        "limit": None,
        "inner": {"sides": [1, 2], "words": ["a"]},
        "later": 1.0,
        "further": {"shift": 2.0},
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_every_other_option_is_recorded(preset):
    for section in (PRESETS[preset].filter, PRESETS[preset].rank):
        later = {item.name for item in fields(section) if BEFORE in item.metadata}
        recorded = {k: v for k, v in to_json(asdict(section)).items() if k not in later}
        assert options_of(section) == recorded


def test_differences_of_options_are_shown_as_they_are_typed():
    changes = [
        "filter.licences=[1], now [2]",
        "topology.resolution=64, now 128",
        "topology_resolution=64, now 128",
        "val_percent=12, now 3",
    ]
    assert as_options(changes) == [
        "--license-allow [1], now [2]",
        "--topology-resolution 64, now 128",
        "--val-percent 12, now 3",
    ]
