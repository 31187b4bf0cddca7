"""Names, splits, seeds and hashes are the same on every machine and in every version."""

from pathlib import Path

from pipeline.core.hashing import differences, hash_of, make_uid, seed_of, split_of


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
