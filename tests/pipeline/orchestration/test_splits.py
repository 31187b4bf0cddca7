"""The splits of a build: decided in the order of the plan, and kept by later builds."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from pipeline.config import BuildConfig
from pipeline.core.errors import UserError
from pipeline.core.hashing import split_of
from pipeline.curation.shape_moments import surface_moments
from pipeline.inspection.verification import verify
from pipeline.orchestration.plan import make_plan, read_plan
from pipeline.orchestration.splits import assign_splits
from pipeline.storage.commit_marker import CommitMarker, describe_files, read_marker, tree_sha256
from pipeline.storage.layout import MANIFEST, manifest_path, marker_path
from pipeline.storage.manifest import ManifestRow, read_manifest, write_manifest
from pipeline.storage.remote import store_path
from tests.pipeline.builds import Listing, rows_of
from train.data.bricks import read_build_index

HALF = 50


def moments_of(shape):
    """Return the moments of a random surface. Equal letters give equal surfaces."""
    draw = np.random.default_rng(ord(shape.lower()))
    triangles = draw.uniform(-0.5, 0.5, (20, 3, 3))
    return surface_moments(triangles).astype(np.float32).tobytes()


def commit_shard(plan, shard, shapes, size=2):
    """Commit the manifest of a shard whose assets have the given shapes, without splits."""
    number = int(shard)
    rows = [
        ManifestRow(
            uid=record.uid,
            source=record.source,
            url=record.url,
            licence=record.licence,
            format=record.format,
            sha256=hashlib.sha256(record.uid.encode()).hexdigest(),
            status="done",
            sign_path="flood",
            center=(0.0, 0.0, 0.0),
            scale=1.0,
            tokens={64: 3},
            shard=shard,
            row=row,
            visible_moments=moments_of(shape),
            face_moments=moments_of(shape),
        )
        for row, (record, shape) in enumerate(
            zip(plan.records(shard), shapes[number * size : (number + 1) * size], strict=True)
        )
    ]
    path = manifest_path(plan.out, shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(path, rows, [64])
    files = describe_files(plan.out, [path.relative_to(plan.out)])
    counts = {"assets": len(rows), "done": len(rows), "rejected": 0, "failed": 0}
    marker = CommitMarker(
        shard=shard, product=MANIFEST, counts=counts, bytes=files[0].bytes, files=files
    )
    marker_path(plan.out, shard, MANIFEST).parent.mkdir(parents=True, exist_ok=True)
    marker_path(plan.out, shard, MANIFEST).write_text(marker.to_json(), encoding="utf-8")


def plan_of(out, names, **options):
    options = {"shard_size": 2, "val_percent": HALF, **options}
    return make_plan(BuildConfig(out=out, **options), [Listing(names)])


def splits_of(out):
    return {row.url: row.split for row in rows_of(out)}


# Twelve assets of five shapes. Some copies would be in different splits by their uids.
NAMES = "abcdefghijkl"
SHAPES = "VWXYZVWXYZVW"


def built(out, order=None, **options):
    plan = plan_of(out, NAMES, **options)
    for shard in order or plan.shards:
        commit_shard(plan, shard, SHAPES)
        assign_splits(plan)
    return plan


def test_copies_share_the_split_of_the_first_one(tmp_path):
    plan = built(tmp_path)
    splits = splits_of(tmp_path)
    uids = {record.url: record.uid for shard in plan.shards for record in plan.records(shard)}
    for name, shape in zip(NAMES, SHAPES):
        assert splits[name] == split_of(uids[NAMES[SHAPES.index(shape)]], HALF)
    alone = {name: split_of(uids[name], HALF) for name in NAMES}
    assert alone != splits  # else the test shows nothing
    assert verify(tmp_path) == []


def test_splits_do_not_depend_on_the_order_of_commits(tmp_path):
    whole = built(tmp_path / "whole")
    other = built(tmp_path / "other", order=whole.shards[::-1])
    assert splits_of(whole.out) == splits_of(other.out)
    for shard in whole.shards:
        assert (
            manifest_path(whole.out, shard).read_bytes()
            == manifest_path(other.out, shard).read_bytes()
        )


def test_splits_wait_for_the_shards_before_them_and_training_leaves_their_assets_out(
    tmp_path, caplog
):
    plan = plan_of(tmp_path, NAMES)
    for shard in (plan.shards[0], plan.shards[2]):
        commit_shard(plan, shard, SHAPES)
        marker = replace(read_marker(tmp_path, shard, MANIFEST), product="sdf-64")
        marker_path(tmp_path, shard, "sdf-64").write_text(marker.to_json(), encoding="utf-8")
    with pytest.raises(UserError, match="run its build command again"):
        read_build_index(tmp_path, [64])
    assign_splits(plan)
    splits = splits_of(tmp_path)
    assert all(splits[name] for name in "ab")
    assert not any(splits[name] for name in "ef")
    assert len(read_build_index(tmp_path, [64])) == 2
    assert "2 of 4 assets" in caplog.text


def test_a_later_build_keeps_the_splits_of_an_earlier_one_and_copies_follow(tmp_path):
    built(tmp_path / "first")
    before = splits_of(tmp_path / "first")
    names, shapes = "pqrsta", "ZYXWVV"  # all are copies, and the last one is the same asset
    plan = plan_of(tmp_path / "second", names, keep_splits_of=(tmp_path / "first",))
    for shard in plan.shards:
        commit_shard(plan, shard, shapes)
    assign_splits(plan)
    expected = {name: before[NAMES[SHAPES.index(shape)]] for name, shape in zip(names, shapes)}
    assert splits_of(plan.out) == expected
    alone = plan_of(tmp_path / "alone", names)
    for shard in alone.shards:
        commit_shard(alone, shard, shapes)
    assign_splits(alone)
    assert splits_of(alone.out) != expected  # else the test shows nothing
    assert verify(plan.out) == []


def test_object_store_splits_are_those_of_a_local_build(store, tmp_path):
    local = plan_of(tmp_path / "build", NAMES)
    for shard in local.shards:
        commit_shard(local, shard, SHAPES)
    url = store_path(store.upload(local.out, "splits"))
    assign_splits(read_plan(url))
    assign_splits(local)
    for shard in local.shards:
        expected = manifest_path(local.out, shard).read_bytes()
        assert manifest_path(url, shard).read_bytes() == expected
        assert read_marker(url, shard, MANIFEST) == read_marker(local.out, shard, MANIFEST)
    later = plan_of(tmp_path / "later", "pqrs", keep_splits_of=(url,))
    for shard in later.shards:
        commit_shard(later, shard, "ZYXW")
    assign_splits(later)
    before = splits_of(local.out)
    assert splits_of(later.out) == {
        name: before[NAMES[SHAPES.index(shape)]] for name, shape in zip("pqrs", "ZYXW")
    }


def test_verification_finds_a_copy_in_the_other_split(tmp_path):
    plan = built(tmp_path)
    path = manifest_path(tmp_path, plan.shards[3])
    rows = read_manifest(path)
    other = {"train": "val", "val": "train"}
    write_manifest(
        path, [replace(row, split=other[row.split]) for row in rows[:1]] + rows[1:], [64]
    )
    breaches = [breach for breach in verify(tmp_path) if "split must be" in breach.rule]
    assert [breach.asset for breach in breaches] == [rows[0].uid]


def test_a_run_that_was_killed_between_marker_and_manifest_is_repaired(tmp_path, monkeypatch):
    plan = plan_of(tmp_path, NAMES)
    for shard in plan.shards:
        commit_shard(plan, shard, SHAPES)

    def killed(path, data):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.orchestration.splits.write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        assign_splits(plan)
    monkeypatch.undo()
    assign_splits(plan)
    for shard in plan.shards:
        (file,) = read_marker(tmp_path, shard, MANIFEST).files
        assert (file.bytes, file.sha256) == tree_sha256(manifest_path(tmp_path, shard))
    assert all(splits_of(tmp_path).values())
