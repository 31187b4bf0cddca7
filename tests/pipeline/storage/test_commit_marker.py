"""Commit markers: their JSON, byte for byte, and what is no marker."""

import json

import pytest

from pipeline.core.product import Product
from pipeline.storage.commit_marker import (
    CommitMarker,
    CommittedFile,
    describe_files,
    read_marker,
    tree_sha256,
)
from pipeline.storage.layout import MANIFEST, list_commits, marker_path

SDF = CommitMarker(
    shard="000000",
    product="sdf-64",
    counts={"assets": 2, "tokens": 9},
    bytes=7,
    files=(CommittedFile(path="sdf/64/000000.zarr", bytes=7, sha256="ab"),),
    format_version=1,
    config={"resolution": 64},
    config_hash="cd",
    devices=("cpu",),
)
MANIFEST_MARKER = CommitMarker(
    shard="000000", product="manifest", counts={"assets": 2}, bytes=0, files=()
)


def test_the_json_has_sorted_keys_and_only_what_is_known():
    assert (
        SDF.to_json()
        == json.dumps(
            {
                "bytes": 7,
                "config": {"resolution": 64},
                "config_hash": "cd",
                "counts": {"assets": 2, "tokens": 9},
                "devices": ["cpu"],
                "files": [{"bytes": 7, "path": "sdf/64/000000.zarr", "sha256": "ab"}],
                "format_version": 1,
                "product": "sdf-64",
                "shard": "000000",
            },
            indent=1,
        )
        + "\n"
    )
    assert sorted(json.loads(MANIFEST_MARKER.to_json())) == [
        "bytes",
        "counts",
        "files",
        "product",
        "shard",
    ]


@pytest.mark.parametrize("marker", [SDF, MANIFEST_MARKER])
def test_a_marker_is_read_back(marker):
    assert CommitMarker.from_json(marker.to_json()) == marker


def test_a_field_of_a_newer_version_is_ignored():
    content = {**json.loads(SDF.to_json()), "signature": "x"}
    assert CommitMarker.from_json(json.dumps(content)) == SDF


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"files": 1}', '{"files": [{"path": "a"}]}']
)
def test_something_else_is_an_error_that_names_the_file(text, tmp_path):
    path = marker_path(tmp_path, "000000", Product.sdf(64))
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"sdf-64\.json is not a commit marker"):
        read_marker(tmp_path, "000000", Product.sdf(64))


def test_commits_are_listed_without_partial_files(tmp_path):
    for shard, name in [("000000", "sdf-64"), ("000000", MANIFEST), ("000001", MANIFEST)]:
        marker_path(tmp_path, shard, name).parent.mkdir(parents=True, exist_ok=True)
        marker_path(tmp_path, shard, name).touch()
    (tmp_path / "shards/000001/.sdf-64.json.partial").touch()
    assert list_commits(tmp_path) == {"000000": {"sdf-64", MANIFEST}, "000001": {MANIFEST}}


def test_the_hash_of_a_directory_is_that_of_its_sorted_files(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c").write_bytes(b"12")
    (tmp_path / "a/d").write_bytes(b"3")
    size, digest = tree_sha256(tmp_path / "a")
    (tmp_path / "a/d").write_bytes(b"4")
    assert (size, len(digest)) == (3, 64)
    assert tree_sha256(tmp_path / "a")[1] != digest
    (file,) = describe_files(tmp_path, [(tmp_path / "a/d").relative_to(tmp_path)])
    assert (file.path, file.bytes) == ("a/d", 1)
